-- What every script begins with. The keys, behind the prefix of -redis.prefix:
--   s:NAME     string  a session (records.py); expires a day after the session, if no cleanup has removed it
--   x          zset    all names, by expiry in microseconds
--   n          zset    all names, by their bytes
--   u:SUBJECT  zset    the names of a subject, by expiry
--   r:REFRESH  zset    the names with a refresh token, by expiry
-- A script is atomic, so the sessions and the indexes agree, unless the server has expired or somebody has
-- deleted a key. Whatever script meets a name without its session removes it from the index.
-- The only key that is declared is x: the others are made from what is found. On a cluster, all of them are in
-- one slot, and a key that never exists is declared too (cluster/slots.py).
local P = string.sub(KEYS[1], 1, -2)
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local HEAD, MAX_HEAD, MAX_FIELDS, DAY_MS = 40, 4136, 262144, 86400000

local function digits(number)
    return string.format('%016.0f', number)
end

-- Reads a session; returns a table if its key is of another type.
local function read(...)
    local found = redis.pcall(...)
    if type(found) == 'table' and not string.find(found.err, '^WRONGTYPE') then
        error(found)
    end
    return found
end

-- Returns the expiry, subject and refresh token. A session that cannot be read never ends by itself.
local function parse(raw)
    local expiry = tonumber(string.sub(raw, 1, 16))
    if not expiry or #raw < HEAD then
        return math.huge, '', ''
    end
    local subject, refresh = struct.unpack('>I4I4', raw, 25)
    return expiry, string.sub(raw, HEAD + 1, HEAD + subject),
        string.sub(raw, HEAD + subject + 1, HEAD + subject + refresh)
end

-- The same of a name; nil: it has no session.
local function head(name)
    local raw = read('GETRANGE', P .. 's:' .. name, 0, MAX_HEAD - 1)
    if raw == '' then
        return nil
    end
    return parse(type(raw) == 'string' and raw or '')
end

local function is_live(name)
    local expiry = head(name)
    return expiry ~= nil and expiry > now
end

-- When the keys of a session end by themselves: a day after it.
local function lasts_ms(expiry)
    return string.format('%.0f', math.ceil(expiry / 1000) + DAY_MS)
end

-- Has a key end at this time (lasts_ms), and no sooner than it did before. NX sets the first expiry of a key, and
-- GT another one: what is likely comes first.
local function lasts(key, ms, is_new)
    local likely, other = 'GT', 'NX'
    if is_new then
        likely, other = other, likely
    end
    if redis.call('PEXPIREAT', key, ms, likely) == 0 then
        redis.call('PEXPIREAT', key, ms, other)
    end
end

local function put(key, name, score, ms)
    -- An index that did not have the name is often new.
    local added = redis.call('ZADD', key, score, name)
    lasts(key, ms, added == 1)
end

local function index(name, expiry, subject, refresh)
    local score, ms = digits(expiry), lasts_ms(expiry)
    redis.call('ZADD', P .. 'x', score, name)
    put(P .. 'u:' .. subject, name, score, ms)
    if refresh ~= '' then
        put(P .. 'r:' .. refresh, name, score, ms)
    end
end

local function unindex(name, subject, refresh)
    redis.call('ZREM', P .. 'x', name)
    redis.call('ZREM', P .. 'n', name)
    redis.call('ZREM', P .. 'u:' .. subject, name)
    if refresh ~= '' then
        redis.call('ZREM', P .. 'r:' .. refresh, name)
    end
end

local function remove(name, subject, refresh)
    redis.call('DEL', P .. 's:' .. name)
    unindex(name, subject, refresh)
end

-- What is sent of a stored session: only the head if its bag is too long, and 1 for what is no string.
local function shown(raw, max_bag)
    if type(raw) == 'table' then
        return 1
    end
    if raw and #raw > max_bag and (#raw > max_bag + MAX_FIELDS or struct.unpack('>I4', raw, 37) > max_bag) then
        return string.sub(raw, 1, HEAD)
    end
    return raw
end

local function move(name, expiry, subject, refresh)
    redis.call('SETRANGE', P .. 's:' .. name, 0, digits(expiry))
    redis.call('PEXPIREAT', P .. 's:' .. name, lasts_ms(expiry))
    index(name, expiry, subject, refresh)
end
