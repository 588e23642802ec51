-- Stores sessions. ARGV: of each, name, life, limit in time, record without its expiry.
-- Returns of each its expiry, -1: too late, -2: the name is in use.

-- Stores a record where there is none, or one that has expired. Returns whether it did.
local function store(name, raw, expiry)
    local key, ms = P .. 's:' .. name, lasts_ms(expiry)
    if redis.call('SET', key, raw, 'PXAT', ms, 'NX') then
        return true
    end
    local old, subject, refresh = head(name)
    if old > now then
        return false
    end
    unindex(name, subject, refresh)
    redis.call('SET', key, raw, 'PXAT', ms)
    return true
end

local out = {}
for at = 1, #ARGV, 4 do
    local name, expiry, limit = ARGV[at], now + tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local raw = digits(expiry) .. ARGV[at + 3]
    if now >= limit then
        out[#out + 1] = -1
    elseif not store(name, raw, expiry) then
        out[#out + 1] = -2
    else
        local _, subject, refresh = parse(raw)
        redis.call('ZADD', P .. 'n', 0, name)
        index(name, expiry, subject, refresh)
        out[#out + 1] = expiry
    end
end
return out
