-- Ends sessions that meet the criteria, expired ones too. ARGV[9]: how many to pass over, limit, limit in time.
-- Returns 1: too late; else 0, 1 if all have been looked at, how many were passed over in all; and the names.
local at, limit = tonumber(ARGV[9]), tonumber(ARGV[10])
local MOST = 5000
if now >= tonumber(ARGV[11]) then
    return { 1 }
end
local out = { 0, 0, 0 }
local names = candidates(after, at, MOST)
for place, name in ipairs(names) do
    local expiry, its_subject, its_refresh = head(name)
    if not expiry then
        forget(name)
    elseif meets(expiry, its_subject, its_refresh) then
        remove(name, its_subject, its_refresh)
        out[#out + 1] = name
    else
        at = at + 1
    end
    if #out - 3 >= limit then
        out[3] = at
        return out
    end
end
out[2], out[3] = #names < MOST and 1 or 0, at
return out
