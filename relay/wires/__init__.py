"""The first step of every chain: bytes of a wire become a Call; its Reply or Refusal becomes bytes again."""
