-- Writes records whose version is still the one that was read. ARGV: claim, and of each, name, version, limit
-- in time, record without its expiry. Returns of each the expiry that it has, or 0 if it was not written.
local claim, out = ARGV[1], {}
for at = 2, #ARGV, 4 do
    local name, version, limit = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
    local key = P .. 's:' .. name
    local found = read('GETRANGE', key, 0, 23)
    local holder = redis.call('GET', P .. 'w:' .. name)
    local written = 0
    if now < limit and type(found) == 'string' and string.sub(found, 17) == version
        and tonumber(string.sub(found, 1, 16)) > now and (not holder or holder == claim) then
        written = string.sub(found, 1, 16)
        redis.call('SET', key, written .. ARGV[at + 3], 'KEEPTTL')
    end
    if holder == claim then
        redis.call('DEL', P .. 'w:' .. name)
    end
    out[#out + 1] = written
end
return out
