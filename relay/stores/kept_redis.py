"""Pull answers that their nodes may not have got, in Redis, for the relays of several hosts.

    flwr-relay:kept:<node>    a hash: what is kept for the node, whose id is written as 16 hex digits
      online                  until when the SuperLink takes the node for available
      e<message>              an entry; `message` is the first 16 bytes of the SHA-256 of the message id
      b<message>              the bytes of the answer, at most `redelivery.max_size`
    flwr-relay:kept:changes   a stream, of about the last CHANGES changes; each has one field. Its name says
                              what happened (`kept`, `ended`, or `over`: ended, and nothing else is left for
                              the node), its value is the node id (8 bytes, big-endian) and `message`

An entry is a text of seven words: holder, token and claim (16 hex digits each: who pulled it, the name of
this handing out by the SuperLink, the name of the last delivery), the number of deliveries, and three times:
until when a delivery is under way, when the TTL of the message is over, and when it was kept. Times are
milliseconds of the clock of Redis, so that the clocks of hosts need not agree. An entry without bytes has had
all its deliveries (it stays, so that no host begins to count again), or waits for its host to send them.

At most PER_NODE entries are kept of a node. The hash ends with the last of them, by itself: with the TTL of
the message, or when the node is not available any more. The stream ends a day after its last change.

Every change is one script, which Redis runs alone: that makes a claim atomic for all hosts. The user of a
relay needs EVALSHA, SCRIPT LOAD, XREAD, TIME, HKEYS, HGET, HEXISTS, HSET, HDEL, DEL, PEXPIREAT, PEXPIRE and
XADD on `flwr-relay:kept:*`. An answer holds ids and settings of a message, and no arrays. Whoever may write
here can have a relay hand out what he wrote, if the SuperLink has an object of that id: keep others out.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from relay.stores.kept import LEASE, PER_NODE
from relay.stores.kept_hosts import Change, Found, Granted, Keeping, Verdict
from relay.stores.redis_link import OutageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

PREFIX = "flwr-relay:kept:"
STREAM = PREFIX + "changes"
CHANGES = 10_000
#: Seconds for an answer, for those who can wait longer than a poll.
SECONDS = 1.0
#: Seconds for which the next change is waited for in one question, and most changes in an answer.
BLOCK = 5.0
_MOST_CHANGES = 100
_CONNECTIONS = 8

_COMMON = """
local key, node = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local online = tonumber(redis.call('HGET', key, 'online') or '0')
local entries = {}

local function forget(entry)
  redis.call('HDEL', key, 'e' .. entry.id, 'b' .. entry.id)
  for place, known in ipairs(entries) do
    if known == entry then table.remove(entries, place) break end
  end
end

local function read()
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.sub(field, 1, 1) == 'e' then
      local holder, token, claim, count, busy, expires, since = string.match(
        redis.call('HGET', key, field), '^(%x+) (%x+) (%x+) (%d+) (%d+) (%d+) (%d+)$')
      local entry = {id = string.sub(field, 2), holder = holder, token = token, claim = claim,
        count = tonumber(count), busy = tonumber(busy), expires = tonumber(expires), since = tonumber(since)}
      if holder and math.min(entry.expires, online) > now then
        table.insert(entries, entry)
      else
        forget(entry)
      end
    end
  end
  table.sort(entries, function(one, other) return one.since < other.since end)
end

local function find(id)
  for _, entry in ipairs(entries) do
    if entry.id == id then return entry end
  end
end

local function write(entry)
  redis.call('HSET', key, 'e' .. entry.id, string.format('%s %s %s %d %.0f %.0f %.0f', entry.holder,
    entry.token, entry.claim, entry.count, entry.busy, entry.expires, entry.since))
end

local function finish()
  local latest = 0
  for _, entry in ipairs(entries) do
    latest = math.max(latest, math.min(entry.expires, online))
  end
  if latest == 0 then
    redis.call('DEL', key)
  else
    redis.call('HSET', key, 'online', string.format('%.0f', online))
    redis.call('PEXPIREAT', key, string.format('%.0f', latest))
  end
end

local function announce(what, id)
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', CHANGES, '*', what, node .. id)
  redis.call('PEXPIRE', KEYS[2], 86400000)
end
""".replace("CHANGES", str(CHANGES))

_KEEP = """
local id, holder, token, body = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local expires, count, busy, most = now + ARGV[6], tonumber(ARGV[8]), now + ARGV[9], tonumber(ARGV[10])
online = math.max(online, now + ARGV[7])
read()
local entry = find(id)
if not entry or entry.token ~= token then
  if entry then  -- the SuperLink has handed it out again
    count = math.min(entry.count + count, 255)
    forget(entry)
  end
  while #entries >= most do forget(entries[1]) end
  entry = {id = id, holder = holder, token = token, claim = token, count = count, busy = busy,
    expires = expires, since = now}
  table.insert(entries, entry)
  write(entry)
end
redis.call('HSET', key, 'b' .. id, body)
finish()
announce('kept', id)
"""

_ACQUIRE = """
local id, holder, token, claim = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local count, most, lease = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
online = math.max(online, now + ARGV[10])
read()
local entry = find(id)
local there = redis.call('HEXISTS', key, 'b' .. id)
if not entry then
  entry = {id = id, holder = holder, token = token, claim = claim, count = count, busy = 0,
    expires = now + ARGV[9], since = now}
  table.insert(entries, entry)
end
if entry.busy > now or entry.holder ~= holder then return {'busy', 0, there} end
entry.count = math.max(entry.count, count)
if entry.count >= most then
  write(entry)
  redis.call('HDEL', key, 'b' .. id)
  finish()
  return {'exhausted', entry.count, there}
end
entry.count, entry.busy, entry.claim = entry.count + 1, now + lease, claim
write(entry)
finish()
return {'granted', entry.count, there}
"""

_CLAIM = """
local holder, claim, most, lease = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
read()
local answer, exhausted = 'nothing', 0
for _, entry in ipairs(entries) do
  local body = redis.call('HGET', key, 'b' .. entry.id)
  if body and (entry.busy > now or entry.holder ~= holder) then
    answer = 'later'
  elseif body and entry.count >= most then
    redis.call('HDEL', key, 'b' .. entry.id)
    exhausted = exhausted + 1
  elseif body then
    entry.count, entry.busy, entry.claim = entry.count + 1, now + lease, claim
    write(entry)
    return {'granted', exhausted, entry.id, entry.count, body}
  end
end
return {answer, exhausted}
"""

_SETTLE = """
local claim, delivered = ARGV[2], ARGV[3] == '1'
read()
for _, entry in ipairs(entries) do
  if entry.claim == claim then
    entry.claim, entry.busy = '0', 0
    if not delivered then entry.count = math.max(entry.count - 1, 0) end
    write(entry)
  end
end
"""

_END = """
local holder, all, gone = ARGV[2], #ARGV == 2, {}
read()
for _, entry in ipairs(entries) do
  local wanted = all
  for place = 3, #ARGV do wanted = wanted or ARGV[place] == entry.id end
  if wanted and (holder == '' or holder == entry.holder) then table.insert(gone, entry) end
end
for _, entry in ipairs(gone) do
  forget(entry)
  announce(#entries == 0 and 'over' or 'ended', entry.id)
end
finish()
return #gone
"""

_ONLINE = """
read()
if #entries > 0 then
  online = now + ARGV[2]
  finish()
end
"""


class KeptRedis:
    """What is kept in one Redis server. Every method raises OutageError if it does not answer in time."""

    def __init__(self, url: str, shown: str, *, lease: float = LEASE) -> None:
        """Use the server at `url`, which `shown` names without a password; nothing is opened yet.

        Args:
            url: `redis://`, `rediss://` or `unix://`, as `relay.settings_types.RedisUrl` checked it.
            shown: what logs may say of it.
            lease: seconds after which a delivery whose end nobody told does not count as under way.
        """
        self.name = f"redis {shown}"
        self._lease = _ms(lease)
        # Whoever blocks for changes needs a connection of his own, and may wait for longer than others.
        self._client = _client(url, _CONNECTIONS, SECONDS)
        self._listener = _client(url, 1, BLOCK + SECONDS)
        scripts = (_KEEP, _ACQUIRE, _CLAIM, _SETTLE, _END, _ONLINE)
        self._keep, self._acquire, self._claim, self._settle, self._end, self._online = (
            self._client.register_script(_COMMON + script) for script in scripts
        )

    async def keep(self, keeping: Keeping) -> None:
        """Keep an answer that is being delivered, or that an earlier `acquire` has found without bytes."""
        await self._run(
            self._keep,
            keeping.node,
            keeping.message,
            keeping.holder.hex(),
            keeping.token.hex(),
            keeping.body,
            _ms(keeping.expires),
            _ms(keeping.online),
            keeping.deliveries,
            self._lease if keeping.busy else 0,
            PER_NODE,
        )

    async def acquire(self, keeping: Keeping, claim: bytes, most: int) -> Verdict:
        """Ask whether this host, which has the bytes and has had them delivered so often, may deliver them.

        An answer that Redis does not know (it lost it, or could not be told) it knows from now on.
        """
        state, count, there = await self._run(
            self._acquire,
            keeping.node,
            keeping.message,
            keeping.holder.hex(),
            keeping.token.hex(),
            claim.hex(),
            keeping.deliveries,
            most,
            self._lease,
            _ms(keeping.expires),
            _ms(keeping.online),
        )
        return Verdict(state.decode(), int(count), there=bool(there))

    async def claim(self, node: int, holder: bytes, claim: bytes, most: int) -> Found:
        """Take the node's oldest answer that may be delivered again; no host gets it before it is settled."""
        state, exhausted, *rest = await self._run(
            self._claim, node, holder.hex(), claim.hex(), most, self._lease
        )
        granted = None
        if rest:
            message, delivery, body = rest
            granted = Granted(message, int(delivery), body)
        return Found(granted, later=state == b"later", exhausted=int(exhausted))

    async def settle(self, node: int, claim: bytes, *, delivered: bool) -> None:
        """End a delivery: the answer may be claimed again. One that certainly was none does not count.

        A claim that was not granted, or is not the last one any more, changes nothing.
        """
        await self._run(self._settle, node, claim.hex(), int(delivered))

    async def end(self, node: int, holder: bytes | None, messages: Iterable[bytes] | None) -> int:
        """Drop these answers, or all of the node, as far as they are the holder's (None: anybody's).

        Returns:
            How many there were.
        """
        if messages is not None and not (messages := tuple(messages)):
            return 0
        return int(await self._run(self._end, node, holder.hex() if holder else "", *(messages or ())))

    async def available(self, node: int, online: float) -> None:
        """Note for how many seconds the SuperLink takes the node for available."""
        await self._run(self._online, node, _ms(online))

    async def changes(self, after: str) -> tuple[str, list[Change]]:
        """Return what changed after the change of this id ("0": all), and the id of the last of them.

        Waits BLOCK seconds for one; then there are none.
        """
        asked = self._listener.xread({STREAM: after}, count=_MOST_CHANGES, block=int(BLOCK * 1000))
        found: list[Change] = []
        for _, changes in await _answer(asked) or ():
            for name, fields in changes:
                after = name.decode()
                found += (
                    Change(int(after.partition("-")[0]), what, int.from_bytes(value[:8], "big"), value[8:])
                    for what, value in fields.items()
                )
        return after, found

    async def close(self) -> None:
        """Close all connections. Never raises OutageError."""
        for client in (self._client, self._listener):
            with suppress(RedisError, OSError):  # they end with the process
                await client.aclose(close_connection_pool=True)

    async def _run(self, script: Any, node: int, *arguments: bytes | str | int) -> Any:
        keys = [f"{PREFIX}{node:016x}", STREAM]
        return await _answer(script(keys=keys, args=[node.to_bytes(8, "big"), *arguments]))


def _client(url: str, connections: int, seconds: float) -> Redis:
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=seconds,
        socket_connect_timeout=SECONDS,
        socket_timeout=seconds,
        retry=None,
        protocol=2,
    )
    return Redis(connection_pool=pool)


async def _answer(asked: Awaitable[Any]) -> Any:
    try:
        return await asked
    except (RedisError, OSError, UnicodeError) as error:  # UnicodeError: no DNS name
        raise OutageError(type(error).__name__) from None


def _ms(seconds: float) -> int:
    return max(0, min(int(seconds * 1000), 10**14))
