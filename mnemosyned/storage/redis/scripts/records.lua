-- Reads sessions as they are. ARGV: most bytes of a bag, "1" if expired ones are wanted too, names.
-- Returns the records, nil where there is no session.
local max_bag, all = tonumber(ARGV[1]), ARGV[2] == '1'
local out = {}
for at = 3, #ARGV do
    local raw = read('GET', P .. 's:' .. ARGV[at])
    if type(raw) == 'string' and not all and parse(raw) <= now then
        raw = false
    end
    out[#out + 1] = shown(raw, max_bag)
end
return out
