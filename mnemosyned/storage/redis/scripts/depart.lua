-- Begins to move sessions to names in other buckets of a cluster (cluster/moves.py). ARGV: most bytes of
-- records in all, and of each, the old name, the new one, which may be empty, and what the move is known by. What
-- has left is kept in the hash l, by its old name: the length of the new name in four bytes, the new name, what
-- the move is known by in 16, the record.
-- Returns of each the clock, the new name, what the move is known by, and the record; nil: there is no live session,
-- and none has left; 0: it has not been looked at, since the records before it are large enough.
local left, most = P .. 'l', tonumber(ARGV[1])
local out, size = {}, 0
for at = 2, #ARGV, 3 do
    local old, new = ARGV[at], ARGV[at + 1]
    if size >= most then
        out[#out + 1] = 0
    else
        local kept = redis.call('HGET', left, old)
        -- Without a new name, only what has left already is wanted.
        local raw = not kept and new ~= '' and read('GET', P .. 's:' .. old)
        if type(raw) == 'string' then
            local expiry, subject, refresh = parse(raw)
            -- What cannot be read stays where it is: `mnemosyned check` finds it.
            if expiry > now and expiry < math.huge then
                kept = struct.pack('>I4', #new) .. new .. ARGV[at + 2] .. raw
                redis.call('HSET', left, old, kept)
                lasts(left, lasts_ms(expiry), false)
                -- For whereabouts.lua, for longer than any call takes.
                redis.call('SET', P .. 'd:' .. old, ARGV[at + 2], 'PX', 60000)
                remove(old, subject, refresh)
            end
        end
        if kept then
            local middle = 4 + struct.unpack('>I4', kept)
            size = size + #kept
            out[#out + 1] = { now, string.sub(kept, 5, middle), string.sub(kept, middle + 1, middle + 16),
                string.sub(kept, middle + 17) }
        else
            out[#out + 1] = false
        end
    end
end
return out
