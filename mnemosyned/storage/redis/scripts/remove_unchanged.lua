-- Removes sessions whose expiry and version are these. ARGV: of each, name and both, empty for what is no string.
-- Returns the names of those that it has removed.
local out = {}
for at = 1, #ARGV, 2 do
    local name = ARGV[at]
    local found = read('GETRANGE', P .. 's:' .. name, 0, 23)
    if type(found) == 'table' and ARGV[at + 1] == '' or found ~= '' and found == ARGV[at + 1] then
        local _, subject, refresh = head(name)
        remove(name, subject, refresh)
        out[#out + 1] = name
    end
end
return out
