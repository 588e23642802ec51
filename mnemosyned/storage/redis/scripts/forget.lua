-- Forgets sessions that have left and have arrived (cluster/moves.py). ARGV: of each, the old name, and what the
-- move is known by.
local left = P .. 'l'
local out = {}
for at = 1, #ARGV, 2 do
    local kept = redis.call('HGET', left, ARGV[at])
    if kept then
        local middle = 4 + struct.unpack('>I4', kept)
        if string.sub(kept, middle + 1, middle + 16) == ARGV[at + 1] then
            redis.call('HDEL', left, ARGV[at])
        end
    end
    out[#out + 1] = 1
end
return out
