-- Returns sessions that have left, and may not have arrived: the clock, and of each of at most ARGV[1] the old name.
local names = redis.call('HKEYS', P .. 'l')
local out = { now }
for at = 1, math.min(#names, tonumber(ARGV[1])) do
    out[at + 1] = names[at]
end
return out
