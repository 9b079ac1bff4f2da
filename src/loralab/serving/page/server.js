// What is asked of the server, and how: the key, requests, streams, and the same request as a command.

const keep = { key: sessionStorage.getItem("loralab-key") || "" };

export const hasKey = () => keep.key !== "";

export function useKey(key) {
  keep.key = key;
  sessionStorage.setItem("loralab-key", key);
}

export const get = path => fetch(path, { headers: headers() });
const headers = more => ({ ...more, ...(keep.key ? { Authorization: `Bearer ${keep.key}` } : {}) });

export async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", signal, body: JSON.stringify(body), headers: headers({ "Content-Type": "application/json" }) });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status has to do */ }
  throw new Error(message);
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const quoted = text => `'${text.replaceAll("'", `'\\''`)}'`;

// Returns a request as a command for a shell. A key is never written out.
export function curl(path, body) {
  const { stream, stream_options, ...plain } = body;
  const lines = [`curl ${quoted(new URL(path, location.href).href)}`, "-H 'Content-Type: application/json'"];
  if (keep.key) lines.push('-H "Authorization: Bearer $LORALAB_KEY"');
  return [...lines, `-d ${quoted(JSON.stringify(plain))}`].join(" \\\n  ");
}
