"""Token ids of what follows a turn of the model: the end of its turn, new messages, and the header of its next one.

The model's own tokens stay as it sampled them, and what stands before them does not change: a turn is continued, not
rendered anew. So the template renders a short conversation in which a mark stands for the turn, and the ids are those
after the mark.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxrlhf.data.encoding import SpecialTokens, Text, encode
from jaxrlhf.data.ends import closing_ids, turn_end
from jaxrlhf.data.renderer import PROBE, Message, Prompt, Renderer, RowProblem, Tools, check_content
from jaxrlhf.data.rendering import EncodedRow, encode_rows
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import InputError


class Continuer:
    """Encodes conversations of several turns for one tokenizer.

    Args:
        tokenizer: A tokenizer from `load_tokenizer`.
        tools: Tools of every conversation, for the chat template.
        special_tokens_in_data: Special tokens in the messages' text keep their meaning.

    Raises:
        InputError: The chat template does not show the tools.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Tools | None = None, special_tokens_in_data: bool = False) -> None:
        self.tokenizer, self.tools, self._literal = tokenizer, tools or None, special_tokens_in_data
        self._special = SpecialTokens(tokenizer)
        self._renderer = Renderer(tokenizer, None if special_tokens_in_data else self._special)
        self._end, self._closing = turn_end(tokenizer), closing_ids(tokenizer)
        if self.tools:
            check_tools(self._renderer, self.tools)
            self._check_results()

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int] | str]:
        """Token ids of prompts, up to where the model's first turn begins; a text says why one cannot be rendered."""
        rows = encode_rows(
            self.tokenizer,
            prompts,
            [()] * len(prompts),
            [self.tools] * len(prompts),
            special_tokens_in_data=self._literal,
        )
        return [row.prompt if isinstance(row, EncodedRow) else row for row in rows]

    def after_turn(self, messages: Sequence[Message], ended: bool) -> list[int]:
        """Token ids that follow a turn of the model, up to where its next one begins.

        Args:
            messages: The messages after the turn.
            ended: True if the turn has its end id already. The template's is then left out.

        Raises:
            RowProblem: The chat template does not render the messages.
        """
        new: list[Message] = [dict(message) for message in messages]
        hidden: dict[str, str] = {}
        if not self._literal and self._special.among(new):
            new = self._special.hide(new, hidden)
        before: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        text = self._rendered([*before, *new])
        head, mark, tail = text.partition(PROBE)
        if not mark or PROBE in tail:
            raise RowProblem("the chat template loses an assistant message, or shows it twice")
        check_content(tail, new)
        encoded = encode(self.tokenizer, [Text(text, hidden)], self._special, places=True)[0]
        ids = encoded.ids[slice(*encoded.tokens(len(head) + len(mark), len(text)))]
        if ended:
            begun = ids if self._end is not None else ids[:1]
            place = next((i for i, token in enumerate(begun) if token == self._end or token in self._closing), -1)
            ids = ids[place + 1 :]
        return ids

    def _rendered(self, messages: list[Message]) -> str:
        try:
            return self._renderer.render_anew(messages, None, True, False)[0]
        except RowProblem:  # templates such as those named tool_use need tools
            if self.tools is None:
                raise
            return self._renderer.render_anew(messages, self.tools, True, False)[0]

    def _check_results(self) -> None:
        """Raises InputError when the chat template does not continue a turn with the result of a tool."""
        try:
            self.after_turn([{"role": "tool", "name": "a", "content": "a"}], ended=True)
        except RowProblem as error:
            raise InputError(f"tools: the result of a tool cannot follow a turn: {error}") from error


def check_tools(renderer: Renderer, tools: Tools) -> None:
    """Raises InputError when the chat template does not show every tool to the model."""
    question: list[Message] = [{"role": "user", "content": "a"}]
    try:
        shown, _ = renderer.render_anew(question, tools, True, False)
    except RowProblem as error:
        raise InputError(f"tools: {error}") from error
    names = [tool.get("function", tool).get("name") for tool in tools]
    hidden = [name for name in names if name not in shown]
    if hidden:
        raise InputError(
            f"tools: the chat template does not show the tool {hidden[0]} to the model; set chat_template to one with "
            "tools, such as hermes"
        )
