"""The script by which the gateway notes, for its access log, what a user would notice in an answer."""

SCRIPT = r"""
-- Watches an answer pass by and notes for the access log what a user would notice: the time to the first text, whether
-- there was any, whether it was cut at the token limit, and whether a stream reached its end.
-- The body is not kept or changed: a short tail of the previous piece is remembered, for a field split between two.

local TAIL = 64

function envoy_on_request(handle)
  handle:streamInfo():dynamicMetadata():set("sluice", "begun", handle:timestamp())
end

function envoy_on_response(handle)
  local kind = handle:headers():get("content-type") or ""
  local streamed = kind:find("text/event-stream", 1, true) ~= nil
  local noted = handle:streamInfo():dynamicMetadata():get("sluice")
  local begun = noted and tonumber(noted["begun"])
  local tail, chunks, ttft, text, truncated, ended, failed = "", 0, nil, false, false, false, false
  for piece in handle:bodyChunks() do
    local length = piece:length()
    if length > 0 then
      chunks = chunks + 1
      local body = tail .. piece:getBytes(0, length)
      if not text and (body:find('"content"%s*:%s*"[^"]') or body:find('"text"%s*:%s*"[^"]')) then
        text = true
        if begun then ttft = tonumber(handle:timestamp()) - begun end
      end
      if body:find('"finish_reason"%s*:%s*"length"') then truncated = true end
      if streamed and body:find("data: [DONE]", 1, true) then ended = true end
      if streamed and body:find('data: {"error"', 1, true) then failed = true end
      tail = body:sub(-TAIL)
    end
  end
  local notes = handle:streamInfo():dynamicMetadata()
  if ttft then notes:set("sluice", "ttft_ms", ttft) end
  notes:set("sluice", "streamed", streamed)
  notes:set("sluice", "chunks", chunks)
  notes:set("sluice", "text", text)
  notes:set("sluice", "truncated", truncated)
  notes:set("sluice", "ended", ended)
  notes:set("sluice", "error", failed)
end
"""
