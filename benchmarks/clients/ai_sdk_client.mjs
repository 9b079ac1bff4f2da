// The AI SDK: ai_sdk_client.mjs URL BASE ADAPTER OTHER. Text, a stream, an object, a tool.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(pathToFileURL(`${process.env.CLIENTS_NODE}/package.json`));
const { generateText, streamText, Output, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

const [url, base, adapter, other] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "loralab", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
const must = (held, what) => { if (!held) throw new Error(what); };
const asked = { prompt: "Who is Ada?", maxRetries: 0, temperature: 0 };

const told = await generateText({ ...asked, model: provider(adapter), maxOutputTokens: 6 });
const stream = streamText({ ...asked, model: provider(adapter), maxOutputTokens: 6 });
let text = "";
for await (const piece of stream.textStream) text += piece;
must(text === told.text && text, "the stream is another text");

const schema = z.object({ city: z.enum(["Oslo", "Rome"]), days: z.number().int().min(1).max(9) });
const shaped = await generateText({ ...asked, model: provider(other), maxOutputTokens: 60, output: Output.object({ schema }) });
must(schema.safeParse(shaped.output).success, "the object is not of its schema");

const tools = { weather: tool({ description: "The weather of a city", inputSchema: schema }) };
const options = { ...asked, model: provider(base), tools, toolChoice: "required", maxOutputTokens: 60 };
const called = await generateText(options);
must(called.toolCalls[0]?.toolName === "weather", "no tool was called");
const streamed = streamText(options);
const calls = await streamed.toolCalls;
must(calls[0]?.toolName === "weather" && schema.safeParse(calls[0].input).success, "no tool was called in a stream");
console.log("version", JSON.parse(readFileSync(`${process.env.CLIENTS_NODE}/node_modules/ai/package.json`)).version);
