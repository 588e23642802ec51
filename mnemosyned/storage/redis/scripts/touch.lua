-- Moves expiries forward. ARGV: of each, name and expiry. Returns 1 or 0 of each: whether it is live.
local out = {}
for at = 1, #ARGV, 2 do
    local name, wanted = ARGV[at], tonumber(ARGV[at + 1])
    local expiry, subject, refresh = head(name)
    local live = expiry ~= nil and expiry > now
    if live and wanted > expiry then
        move(name, wanted, subject, refresh)
    end
    out[#out + 1] = live and 1 or 0
end
return out
