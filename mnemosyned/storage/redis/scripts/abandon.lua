-- Ends sessions. ARGV: of each, name and limit in time. Returns of each 1: it was live, 0: it was not,
-- -1: too late.
local out = {}
for at = 1, #ARGV, 2 do
    local name = ARGV[at]
    if now >= tonumber(ARGV[at + 1]) then
        out[#out + 1] = -1
    else
        local expiry, subject, refresh = head(name)
        if expiry then
            remove(name, subject, refresh)
        end
        out[#out + 1] = expiry and expiry > now and 1 or 0
    end
end
return out
