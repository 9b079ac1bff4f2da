"""Conversations as generation meets them: what is asked before an answer, what must follow it.

A chat template writes a conversation with the opening of the next answer, which is all that a model
is ever asked with, and it writes it whole. The two need not agree: an opening may begin a thought
or end an empty one, and the whole may leave thoughts out or bring one. So an answer is learnt as
what continues its opening: what the whole says there, if that holds the answer as it is, and else
the answer itself and the end of turn. Where neither is certain the row is refused.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from loralab.errors import DataError
from loralab.tasks.pictured import contents
from loralab.tasks.template import render
from loralab.tasks.thoughts import FIELDS, FIRSTS, THOUGHTS, has_one_thought, thought_at_the_end, tight
from loralab.tasks.tools import names_of, unwritten

Chat = Sequence[Mapping[str, Any]]  # texts; calls of tools are objects
Tokens = tuple[tuple[str, str], ...]  # special tokens: what each is for, and its text
STAND_IN = "answer-7f3a9c"  # for an answer, where all that a template writes around it is wanted
MAX_TEMPLATE_ANSWER = 40  # characters of an answer that may stand in what the template writes itself
MAX_QUOTED_ANSWER = 40  # characters of an answer in an error


@dataclass(frozen=True)
class Turn:
    """The text that a model is asked with, and the text that it should write after it."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Said:
    """Tools, and values of a chat template's own variables, which it is told beside the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


NOTHING = Said()


def turns(tokenizer: Any, chat: Chat, said: Said = NOTHING, learnt: Sequence[int] | None = None) -> list[Turn]:
    """Return answers of a conversation, in order.

    Args:
        learnt: their places; None is every answer.

    Raises:
        DataError: the chat template refuses the conversation, or an answer cannot be learnt.
    """
    if learnt is None:
        learnt = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    return [last_turn(tokenizer, chat[: i + 1], said) for i in learnt]


def last_turn(tokenizer: Any, chat: Chat, said: Said = NOTHING) -> Turn:
    """Return the answer that ends a conversation.

    Raises:
        DataError: the chat template refuses the conversation, or the answer cannot be learnt.
    """
    now = datetime.now()  # one for both, or a template with a clock may write two different ones
    prompt = write(tokenizer, chat[:-1], prompt=True, now=now, said=said)
    if not tokenizer.chat_template:
        return Turn(prompt, chat[-1]["content"])
    whole = write(tokenizer, chat, now=now, said=said)
    return Turn(prompt, _Answer(tokenizer, chat, prompt, now, said).target(whole))


def write(
    tokenizer: Any, chat: Chat, *, prompt: bool = False, now: datetime | None = None, said: Said = NOTHING
) -> str:
    """Return a conversation as text; `prompt` opens the next answer, which may call tools.

    Without `prompt` none is opened, also where the template always does.

    Raises:
        DataError: the chat template refuses it.
    """
    if not tokenizer.chat_template:
        return "".join(_spaced(message["content"]) for message in chat)
    try:
        template, tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        read = contents(template, chat)
        text = render(template, read, prompt=prompt, tokens=tokens, now=now, tools=said.tools, kwargs=said.kwargs)
        return text if prompt else text.removesuffix(_needless_opening(template, _texts(tokens)))
    except Exception as error:  # jinja's own errors, and whatever a template raises
        what = f"the row {chat[0]['content'][:MAX_QUOTED_ANSWER]!r}" if chat else "an answer to nothing"
        raise DataError(
            f"the chat template refuses {what}: {error}", code="template_refuses_row", field="chat_template"
        ) from None


def require_written(tokenizer: Any, chat: Chat, said: Said, prompt: str) -> None:
    """Require that a chat template writes the tools and every message that is no answer.

    Args:
        chat: the messages before an answer.
        prompt: what the template makes of them.

    Raises:
        DataError: it leaves one out.
    """
    now = datetime.now()
    if said.tools and write(tokenizer, chat, prompt=True, now=now) == write(
        tokenizer, chat, prompt=True, now=now, said=said
    ):
        raise DataError(
            f"the chat template does not write tools, and the row has {names_of(said.tools)}; use --map tools= to "
            "train without, or a model whose template does",
            code="tools_not_written",
            field="tools",
        )
    for place, message in enumerate(chat):
        if message["role"] == "assistant" or message["content"].strip() in prompt:
            continue
        other = [*chat[:place], {**message, "content": STAND_IN}, *chat[place + 1 :]]
        same = write(tokenizer, chat, prompt=True, now=now, said=said)
        if same == write(tokenizer, other, prompt=True, now=now, said=said):
            raise DataError(
                f"the chat template does not write the {message['role']} message "
                f"{message['content'][:MAX_QUOTED_ANSWER]!r}; remove it, or use a model whose template does",
                code="message_not_written",
                field="chat_template",
            )


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many elements two sequences share at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class _Answer:
    """The last answer of a conversation, after its prompt."""

    tokenizer: Any
    chat: Chat
    prompt: str
    now: datetime
    said: Said

    @property
    def text(self) -> str:
        return self.chat[-1]["content"]

    def target(self, whole: str) -> str:
        """Return what must follow the prompt; `whole` is the conversation as the template writes it."""
        if self.chat[-1].keys() & {"tool_calls", *FIELDS}:
            return self._of_parts(whole)
        if whole.startswith(self.prompt):
            target = whole[len(self.prompt) :]
            if self._is_held(target):
                return target
            return self._put_together(target)
        return self._put_together("")

    def _of_parts(self, whole: str) -> str:
        """Return the same of an answer that is more than a text: all its parts must be written."""
        message, (first, last, ended) = self.chat[-1], thought_at_the_end(self.prompt)
        thought = next((message[name].strip() for name in FIELDS if message.get(name)), "")
        if not whole.startswith(self.prompt):
            if first and ended and thought:
                self._refuse_second(first, last)
            if first and not ended and not thought:
                self._refuse_open(first, last)
            self._refuse_changed()
        target = whole[len(self.prompt) :]
        text = self._shown() + target
        for first, last in THOUGHTS:
            if text.count(first) > text.count(last):
                self._refuse_open(first, last)
        unheld = [part for part in (thought, self.text) if tight(part) not in tight(text)]
        if left_out := next(iter(unheld), "") or unwritten(message.get("tool_calls", ()), target):
            self._refuse_part(left_out)
        return target

    def _refuse_part(self, part: str) -> NoReturn:
        raise DataError(
            f"the chat template does not write {part[:MAX_QUOTED_ANSWER]!r} of an answer that has "
            f"{', '.join(name for name in self.chat[-1] if name not in ('role', 'learn'))}; remove it from the row, or "
            "use a model whose template does",
            code="part_not_written",
            field="chat_template",
        )

    def _is_held(self, target: str) -> bool:
        """Return whether a target holds the answer as it is, but for the space around thoughts."""
        shown, (lead, end) = self._shown(), _usual_frame(self.tokenizer)
        usual = target.startswith(lead) and target.endswith(end)
        if usual and target[len(lead) : len(target) - len(end)].strip() == self.text.strip():
            return not shown + lead or has_one_thought(tight(shown + lead), tight(self.text))
        text, answer = tight(shown + target), tight(self.text)
        if len(answer) < MAX_TEMPLATE_ANSWER and text.count(answer) <= self._markup(shown).count(answer):
            return False
        before, found, _ = text.rpartition(answer)
        return bool(found) and has_one_thought(before, answer)

    def _shown(self) -> str:
        """Return the thought that the prompt ends in, which a model would go on with; or none."""
        first, last, ended = thought_at_the_end(self.prompt)
        return first + last * ended

    def _markup(self, shown: str) -> str:
        """Return all that the template writes of an answer, but the answer."""
        before, _, after = self._around()
        return tight(shown + before.removeprefix(self.prompt) + after)

    def _around(self) -> tuple[str, str, str]:
        """Return the whole before the answer, a stand-in for it or nothing, and the whole after it."""
        stand_in = {"role": "assistant", "content": STAND_IN}
        whole = write(self.tokenizer, [*self.chat[:-1], stand_in], now=self.now, said=self.said)
        return whole.rpartition(STAND_IN)

    def _put_together(self, target: str) -> str:
        """Return the answer, without what the prompt has of it, and the end of turn.

        Args:
            target: what the template writes after the prompt, if it does.
        """
        before, found, after = self._around()
        if not found:
            self._refuse_changed()
        first, last, ended = thought_at_the_end(self.prompt)
        if first and ended:
            return self._after_an_ended_thought(first, last) + after
        if first:
            return self._within_a_thought(first, last) + after
        if before.startswith(self.prompt):
            lead = before[len(self.prompt) :]
            self._require_cut_thought(lead, target)
            return lead + self.text + after
        return self._after_an_opening(before) + after

    def _within_a_thought(self, first: str, last: str) -> str:
        own = self.text.lstrip()
        if last not in own:
            self._refuse_open(first, last)
        if not own.startswith(first):
            return self.text
        rest, space = own[len(first) :], _space_after(self.prompt)
        rest = rest[len(space) :] if rest.startswith(space) else rest.lstrip()
        if not has_one_thought(first, tight(rest)):
            self._refuse_second(first, last)
        return rest

    def _after_an_ended_thought(self, first: str, last: str) -> str:
        thought, ended, rest = self.text.lstrip().partition(last)
        if ended and thought.removeprefix(first).strip():
            self._refuse_second(first, last)
        if ended:  # it brings the empty thought that the prompt has
            return rest.lstrip()
        if thought.startswith(FIRSTS):
            self._refuse_second(first, last)
        return self.text

    def _after_an_opening(self, before: str) -> str:
        """Return the answer where the whole does not begin with the prompt.

        That is so where only the last question has a system message; what the prompt adds for the
        answer must still be what the whole writes in front of one.
        """
        missing = self._opening_that_is_not_in(before)
        own = self.text.lstrip()
        if missing and own.startswith(missing):
            return own[len(missing) :].lstrip()
        if missing:
            raise DataError(
                f"the chat template opens an answer with {missing[-80:]!r} when it asks for one, "
                f"and not where there is one, such as {self._quoted()}; begin the answers with it, "
                "or let the template write the same in both places",
                code="prompt_not_continued",
                field="chat_template",
            )
        space, asked = _space_after(before), _space_after(self.prompt)
        return (space[len(asked) :] if space.startswith(asked) else "") + self.text

    def _opening_that_is_not_in(self, before: str) -> str:
        """Return the end of the prompt's opening that `before`, which leads to an answer, lacks."""
        opening = self._opening()
        lengths = range(len(opening), -1, -1)
        both = next(n for n in lengths if before.rstrip().endswith(opening[:n].rstrip()))
        return opening[both:].strip()

    def _opening(self) -> str:
        """Return all that the template writes to open the answer."""
        asked = write(self.tokenizer, self.chat[:-1], now=self.now, said=self.said)
        return self.prompt[common_length(self.prompt, asked) :]

    def _require_cut_thought(self, lead: str, target: str) -> None:
        """Require that a template leaves out nothing but a thought, which a model writes by itself.

        Raises:
            DataError: it changes the answer, or writes a thought of its own in front of it.
        """
        own = self.text.lstrip()
        for first, last in THOUGHTS:
            _, ended, answer = own.rpartition(last)
            if own.startswith(first) and ended and tight(answer) in tight(target):
                if not has_one_thought(tight(lead), tight(own)):
                    self._refuse_second(first, last)
                return
        self._refuse_changed()

    def _refuse_open(self, first: str, last: str) -> NoReturn:
        opening = repr(self._opening()[-80:].strip())
        raise DataError(
            f"the chat template begins every answer with a thought ({opening}), and the "
            f"answer {self._quoted()} does not end it with {last}: give each answer a thought "
            f"({first} ... {last}, it may be empty), or take the thought out of the template",
            code="thought_left_open",
            field="chat_template",
        )

    def _refuse_second(self, first: str, last: str) -> NoReturn:
        raise DataError(
            f"the chat template writes a thought of its own ({first} ... {last}) in front of an "
            f"answer, and the answer {self._quoted()} brings another; take it out of the answers "
            "(--thoughts drop), or out of the template",
            code="second_thought",
            field="chat_template",
        )

    def _refuse_changed(self) -> NoReturn:
        raise DataError(
            f"the chat template does not write the answer {self._quoted()} as it is after its "
            "prompt; it cannot be learnt with this tokenizer",
            code="answer_not_written",
            field="chat_template",
        )

    def _quoted(self) -> str:
        return repr(self.text[:MAX_QUOTED_ANSWER])


def _usual_frame(tokenizer: Any) -> tuple[str, str]:
    """Return what a template writes after the prompt of a first answer, before it and behind it.

    Where that is not known it is what no answer stands between.
    """
    return _frame(tokenizer.get_chat_template(), _texts(tokenizer.special_tokens_map))


def _texts(tokens: Mapping[str, Any]) -> Tokens:
    """Return special tokens, those that are one each, to be remembered by."""
    return tuple((name, token) for name, token in tokens.items() if type(token) is str)


@functools.lru_cache(maxsize=16)
def _needless_opening(template: str, tokens: Tokens) -> str:
    """Return the opening of an answer that a template writes whether one is asked for or not; or "".

    Such a template writes it and nothing else where there is no message.
    """
    chat = contents(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}])
    own, now = dict(tokens), datetime.now()
    try:
        whole = render(template, chat, prompt=False, tokens=own, now=now)
        if whole != render(template, chat, prompt=True, tokens=own, now=now):
            return ""
        alone = render(template, [], prompt=False, tokens=own, now=now)
    except Exception:  # such as one that looks at the first message
        return ""
    return alone if alone.strip() and whole.endswith(alone) else ""


@functools.lru_cache(maxsize=16)
def _frame(template: str, tokens: Tokens) -> tuple[str, str]:
    chat = contents(template, [{"role": "user", "content": "a"}, {"role": "assistant", "content": STAND_IN}])
    if _needless_opening(template, tokens):
        return STAND_IN, STAND_IN
    try:
        prompt = render(template, chat[:1], prompt=True, tokens=dict(tokens))
        before, found, end = render(template, chat, prompt=False, tokens=dict(tokens)).rpartition(STAND_IN)
    except Exception:  # such as one that wants a system message
        return STAND_IN, STAND_IN
    known = found and before.startswith(prompt)
    return (before[len(prompt) :], end) if known else (STAND_IN, STAND_IN)


def _space_after(text: str) -> str:
    return text[len(text.rstrip()) :]


def _spaced(text: str) -> str:
    """End a plain prompt in white space, so that the answer begins a new token."""
    return text if text[-1:].isspace() else text + "\n"
