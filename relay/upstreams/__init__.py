"""The last step of every chain: a Call leaves for the SuperLink, a Reply or a Refusal comes back."""
