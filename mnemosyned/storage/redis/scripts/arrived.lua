-- Ends what arrive.lua keeps of arrivals that are not repeated any more. ARGV: ms, and of each, the new name, and
-- what the move is known by.
local out = {}
for at = 2, #ARGV, 2 do
    redis.call('PEXPIRE', P .. 'a:' .. ARGV[at + 1] .. ':' .. ARGV[at], ARGV[1])
    out[#out + 1] = 1
end
return out
