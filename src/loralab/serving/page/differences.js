// The words of one text that another one lacks: the longest common subsequence of words.

const LONGEST = 1500;  // words of a text that is compared; the rest counts as different

// Chinese and its neighbours write no spaces: each sign is a word there.
export const pieces = text => text.match(/\s+|[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+/g) || [];
const isWord = piece => /\S/.test(piece);

// Returns [{text, same}] that make up `text`, and the share of its words that `other` has too.
export function differences(text, other) {
  const all = pieces(text), words = all.filter(isWord);
  const common = commonWords(words.slice(0, LONGEST), pieces(other).filter(isWord).slice(0, LONGEST));
  let number = 0;
  const same = all.map(piece => isWord(piece) ? common.has(number++) : null);
  const parts = [];
  all.forEach((text, i) => {
    const alike = same[i] ?? !(same[i - 1] === false && same[i + 1] === false);  // a space is marked inside what is marked
    if (parts.at(-1)?.same === alike) parts.at(-1).text += text;
    else parts.push({ text, same: alike });
  });
  return { parts, share: words.length ? common.size / words.length : 1 };
}

// Returns the positions in `a` of a longest common subsequence with `b`.
function commonWords(a, b) {
  const width = b.length + 1, longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      longest[i * width + j] = a[i] === b[j] ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const found = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { found.add(i); i++; j++; }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return found;
}
