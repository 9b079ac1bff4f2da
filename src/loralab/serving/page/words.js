// Everything that the page says, in both languages. A word in one is a word in the other.

export const WORDS = {
  en: {
    ask: "Ask", mode: "Kind of answer", answers: "Answers",
    running: "running", waiting: "waiting", held: "in memory", compared: "Compare", chat: "Chat", text: "Completion",
    classes: "Classes", temperature: "Temperature", most: "Max tokens", seed: "Seed", anySeed: "any", stop: "Stop", run: "Run",
    follow: "Follow up", system: "System message", you: "You",
    store: "Adapters", name: "Name", method: "Method", size: "Size", task: "Task", score: "Score", memory: "State", digest: "Digest",
    needsKey: "This server needs a key. It is kept until the tab is closed.", wrongKey: "This key is not valid.", open: "Use",
    picture: "Picture", promptChat: "Message", promptText: "Text to continue", promptClasses: "Text to classify",
    base: "base", loaded: "loaded", pinned: "pinned", speed: "Tokens/s", first: "First token", tokens: "Tokens", took: "Time",
    number: "Classes", hint: "Up to four adapters and the base.", full: "Four adapters are compared already; remove one first.",
    more: "Add an adapter …", unlabelled: "without labels, not asked", noLabels: "Choose an adapter with labels; the others do not classify.",
    filter: "Filter by name, task, method or digest", nothing: "No adapter matches.",
    noneYet: "The store is empty. Put adapter folders into it and start again, or load one: POST /v1/load_lora_adapter",
    shown: (n, all) => n === all ? `${all}` : `${n} of ${all}`, first200: "the first 200 are shown",
    exampleOf: name => `Example from ${name}:`, useExample: "Use",
    marks: "Mark what differs from the base", same: "Same words", copy: "Copy", curl: "Copy as curl", copied: "Copied.",
    notCopied: "The browser does not allow copying.",
    away: "The server does not answer.", sick: "The engine has stopped; see the server's log.", finished: "All answers are here.",
    cut: "stopped", language: "中文", remove: "remove", add: "compare", choose: "Choose a picture first.", length: "cut at max tokens",
  },
  "zh-TW": {
    ask: "提問", mode: "回答方式", answers: "回答",
    running: "執行中", waiting: "等待中", held: "在記憶體", compared: "比較", chat: "對話", text: "續寫",
    classes: "分類", temperature: "溫度", most: "最多 token 數", seed: "隨機種子", anySeed: "任意", stop: "停止", run: "執行",
    follow: "追問", system: "系統訊息", you: "你",
    store: "Adapter", name: "名稱", method: "方法", size: "大小", task: "任務", score: "分數", memory: "狀態", digest: "摘要值",
    needsKey: "這台伺服器需要金鑰；關閉分頁前都會記住。", wrongKey: "金鑰無效。", open: "使用",
    picture: "圖片", promptChat: "訊息", promptText: "要續寫的文字", promptClasses: "要分類的文字",
    base: "基礎模型", loaded: "已載入", pinned: "固定", speed: "token/秒", first: "首個 token", tokens: "token 數", took: "時間",
    number: "類別數", hint: "最多四個 adapter，加上基礎模型。", full: "已在比較四個 adapter；請先移除一個。",
    more: "加入 adapter…", unlabelled: "沒有標籤，不提問", noLabels: "請選擇有標籤的 adapter；其他的不會分類。",
    filter: "依名稱、任務、方法或摘要值篩選", nothing: "沒有符合的 adapter。",
    noneYet: "這裡還沒有 adapter。放入 adapter 資料夾後重新啟動，或以 POST /v1/load_lora_adapter 載入。",
    shown: (n, all) => n === all ? `${all}` : `${n} / ${all}`, first200: "只列出前 200 個",
    exampleOf: name => `${name} 的範例：`, useExample: "使用",
    marks: "標示與基礎模型不同之處", same: "相同字詞", copy: "複製", curl: "複製為 curl", copied: "已複製。",
    notCopied: "瀏覽器不允許複製。",
    away: "伺服器沒有回應。", sick: "引擎已停止；請看伺服器的紀錄。", finished: "所有回答都已完成。",
    cut: "已停止", language: "English", remove: "移除", add: "比較", choose: "請先選擇圖片。", length: "達到最多 token 數",
  },
};

const wanted = new URLSearchParams(location.search).get("lang") || localStorage.getItem("loralab-language")
  || (/^zh/i.test(navigator.language) ? "zh-TW" : "en");
let language = WORDS[wanted] ? wanted : "en";

// The words of the language that is shown; the others after `switchLanguage`.
export let say = WORDS[language];
export const tongue = () => language;

export function switchLanguage() {
  language = language === "en" ? "zh-TW" : "en";
  localStorage.setItem("loralab-language", language);
  say = WORDS[language];
}
