-- Renews the row of a node; see LeaseStore. ARGV: name, instance, number, ring, seen, and what it replaces:
-- instance and number. A row is "instance number epoch base seen renewed ring". The instance has more digits than a
-- number of Lua, and is a text.
-- Returns the identity of the store, the clock, and of each row its name, text and age.
local nodes = P .. 'nodes'
local name, instance, number, ring, seen = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local row = redis.call('HGET', nodes, name)
local epoch, base
if not row then
    epoch, base = seen + 1, seen + 1
else
    local its_instance, its_number, its_epoch, its_base = string.match(row, '^(%d+) (%d+) (%d+) (%d+) ')
    if its_instance == instance and tonumber(its_number) < number
        or its_instance == ARGV[6] and its_number == ARGV[7] then
        epoch, base = tonumber(its_epoch), tonumber(its_base)
        if seen > epoch then
            epoch = seen + 1
        end
    end
end
if epoch then
    redis.call('HSET', nodes, name,
        string.format('%s %.0f %.0f %.0f %.0f %.0f %s', instance, number, epoch, base, seen, now, ring))
end
redis.call('PEXPIRE', nodes, DAY_MS)
local out = { store_identity(), now }
local rows = redis.call('HGETALL', nodes)
for at = 1, #rows, 2 do
    out[#out + 1] = rows[at]
    out[#out + 1] = rows[at + 1]
end
return out
