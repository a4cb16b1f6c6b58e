"""Two small scripts inside the gateway: what a request is known by, and what a user would notice in its answer."""

TRACE_SCRIPT = r"""
-- A request without a valid traceparent (W3C Trace Context) gets one, so that every answer can be found again.
local source = assert(io.open("/dev/urandom", "rb"))
local seed = 0
for _ = 1, 6 do seed = seed * 256 + source:read(1):byte() end
source:close()
math.randomseed(seed)

local function digits(count)
  local found = {}
  for index = 1, count do found[index] = string.format("%x", math.random(0, 15)) end
  return table.concat(found)
end

function envoy_on_request(handle)
  local given = handle:headers():get("traceparent") or ""
  local version, trace, span = given:match("^(%x%x)%-(%x+)%-(%x+)%-%x%x")
  if not version or version == "ff" or #trace ~= 32 or #span ~= 16 or trace:match("^0+$") or span:match("^0+$") then
    handle:headers():replace("traceparent", "00-" .. digits(32) .. "-" .. digits(16) .. "-01")
  end
end
"""

ANSWER_SCRIPT = r"""
-- Watches an answer pass by and notes for the access log what a user would notice: when the first and the last text
-- came and in how many pieces, whether there was any, whether it was cut at the token limit, and whether a stream
-- reached its end. The body is not changed, and no more of it is kept than one unfinished event.

local TAIL, LONGEST = 64, 65536

function envoy_on_request(handle)
  handle:streamInfo():dynamicMetadata():set("sluice", "begun", handle:timestamp())
end

function envoy_on_response(handle)
  local kind = handle:headers():get("content-type") or ""
  local streamed = kind:find("text/event-stream", 1, true) ~= nil
  local noted = handle:streamInfo():dynamicMetadata():get("sluice")
  local begun = noted and tonumber(noted["begun"])
  local now, ttft, last = nil, nil, nil
  local rest, tokens, text, truncated, ended, failed = "", 0, false, false, false, false

  local function look(part)
    if part:find('"content"%s*:%s*"[^"]') or part:find('"text"%s*:%s*"[^"]')
        or part:find('"tool_calls"%s*:%s*%[%s*{') then
      if not text then ttft = now end
      text, last, tokens = true, now, tokens + 1
    end
    if part:find('"finish_reason"%s*:%s*"length"') then truncated = true end
    if streamed and part:find("^data:%s*%[DONE%]") then ended = true end
    if streamed and (part:find('^data:%s*{%s*"error"') or part:find("^event:%s*error")) then failed = true end
  end

  for piece in handle:bodyChunks() do
    local length = piece:length()
    if length > 0 then
      now = begun and tonumber(handle:timestamp()) - begun
      rest = rest .. piece:getBytes(0, length)
      if streamed then
        local from, first, stop = 1, nil, nil
        while true do
          first, stop = rest:find("\r?\n\r?\n", from)
          if not first then break end
          look(rest:sub(from, first - 1))
          from = stop + 1
        end
        rest = rest:sub(from):sub(-LONGEST)
      else
        look(rest)
        rest = rest:sub(-TAIL)
      end
    end
  end
  if streamed then look(rest) end

  local notes = handle:streamInfo():dynamicMetadata()
  if ttft then notes:set("sluice", "ttft_ms", ttft) end
  if last then notes:set("sluice", "last_ms", last) end
  notes:set("sluice", "streamed", streamed)
  notes:set("sluice", "tokens", tokens)
  notes:set("sluice", "text", text)
  notes:set("sluice", "truncated", truncated)
  notes:set("sluice", "ended", ended)
  notes:set("sluice", "error", failed)
end
"""
