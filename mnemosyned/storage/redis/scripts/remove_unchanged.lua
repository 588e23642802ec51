-- Removes sessions whose expiry and version are these. ARGV: of each, name and both, empty for what is no string.
-- Returns 1 or 0 of each: whether it has been removed.
local out = {}
for at = 1, #ARGV, 2 do
    local name = ARGV[at]
    local found = read('GETRANGE', P .. 's:' .. name, 0, 23)
    local same = type(found) == 'table' and ARGV[at + 1] == '' or found ~= '' and found == ARGV[at + 1]
    if same then
        local _, subject, refresh = head(name)
        remove(name, subject, refresh)
    end
    out[#out + 1] = same and 1 or 0
end
return out
