-- Tells which names have a live session: 1 or 0 of each.
local out = {}
for at = 1, #ARGV do
    out[at] = is_live(ARGV[at]) and 1 or 0
end
return out
