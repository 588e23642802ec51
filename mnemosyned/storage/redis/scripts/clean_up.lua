-- Removes expired sessions. ARGV: how many names to look at. Returns how many it has looked at, and the names
-- of those that it has removed.
local names = redis.call('ZRANGEBYSCORE', P .. 'x', '-inf', digits(now), 'LIMIT', 0, ARGV[1])
local out = { #names }
for _, name in ipairs(names) do
    local expiry, subject, refresh = head(name)
    if not expiry then
        -- The server has expired it. Its other indexes have the expiry too, and end by themselves.
        unindex(name, '', '')
    elseif expiry <= now then
        remove(name, subject, refresh)
        out[#out + 1] = name
    elseif expiry == math.huge then
        -- It cannot be read: `mnemosyned check` finds it.
        redis.call('ZADD', P .. 'x', digits(now + 3600000000), name)
    else
        index(name, expiry, subject, refresh)
    end
end
return out
