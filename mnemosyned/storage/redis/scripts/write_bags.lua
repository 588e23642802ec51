-- Writes records whose version is still the one that was read. ARGV: claim, and of each, name, version, limit
-- in time, record without its expiry. Returns 1 or 0 of each: whether it was written.
local claim, out = ARGV[1], {}
for at = 2, #ARGV, 4 do
    local name, version, limit = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
    local key = P .. 's:' .. name
    local found = read('GETRANGE', key, 0, 23)
    local holder = redis.call('GET', P .. 'w:' .. name)
    local written = 0
    if now < limit and type(found) == 'string' and string.sub(found, 17) == version
        and tonumber(string.sub(found, 1, 16)) > now and (not holder or holder == claim) then
        redis.call('SET', key, string.sub(found, 1, 16) .. ARGV[at + 3], 'KEEPTTL')
        written = 1
    end
    if holder == claim then
        redis.call('DEL', P .. 'w:' .. name)
    end
    out[#out + 1] = written
end
return out
