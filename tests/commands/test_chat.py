"""Conversations: streaming, history, commands, and what is refused."""

import io

import jax
import numpy as np
import pytest

from jaxrlhf import keys
from jaxrlhf.commands.chat import (
    ChatConfig,
    ChatSession,
    StreamedText,
    chat,
    open_session,
    printable,
    read_lines,
    talk,
)
from jaxrlhf.config import parse
from jaxrlhf.data import TemplateConfig, encode_conversation, with_template
from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import model_from_overrides, save_pretrained
from jaxrlhf.runs.console import Console

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONTEXT = 64
TEXTS = ["Human: What is hot? Assistant: The sun is hot.", "You are kind, and I am well."] * 50


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(len(tokenizer))


def tiny(vocab_size, head="lm"):
    options = SHAPE | {"vocab_size": vocab_size, "max_position_embeddings": CONTEXT, "initializer_range": 0.5}
    return model_from_overrides("llama", options, head=head)


@pytest.fixture
def console():
    return Console(stream=io.StringIO())


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


class ScriptedEngine:
    """Stands for the engine: answers with given texts, one token at a time, and keeps the prompts it saw."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.prompts = tokenizer, list(answers), []

    def stream(self, prompt_ids, prompt_mask, key, sampling):
        self.prompts.append(prompt_ids[prompt_mask].tolist())
        ids = self.tokenizer(self.answers.pop(0))["input_ids"]
        for token in [*ids, self.tokenizer.eos_token_id][: sampling.max_new_tokens]:
            yield np.array([token])


def scripted(model, tokenizer, *answers, console=None, **options):
    session = ChatSession(model, tokenizer, ChatConfig.create(model="tiny", **options), console)
    session.engine = ScriptedEngine(tokenizer, answers)
    return session


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_streamed_answer_is_what_generate_gives(model, tokenizer, temperature):
    session = ChatSession(model, tokenizer, ChatConfig.create(model="tiny", max_new_tokens=12, temperature=temperature))
    pieces = list(session.reply("What is hot?"))
    ids = np.array([encode_conversation(session.tokenizer, [user("What is hot?")])])
    key = keys.stream(session.config.seed, keys.Stream.CHAT, 0)
    rollout = jax.device_get(session.engine.generate(ids, np.ones_like(ids), key, session.sampling))
    expected = tokenizer.decode(rollout.tokens[rollout.response_mask], skip_special_tokens=True).lstrip()
    assert expected and "".join(pieces) == expected
    assert len(pieces) > 1
    assert session.messages == [user("What is hot?"), assistant(expected.rstrip())]


def test_the_same_conversation_gets_the_same_answers_and_a_new_round_other_draws(model, tokenizer):
    session = ChatSession(
        model, tokenizer, ChatConfig.create(model="tiny", max_new_tokens=8, temperature=1.0, top_p=1.0)
    )
    first = "".join(session.reply("hello"))
    session.messages.clear()
    assert "".join(session.reply("hello")) != first
    session.reset()
    assert "".join(session.reply("hello")) == first


def test_the_history_is_rendered_from_the_oldest_round_on(model, tokenizer):
    session = scripted(model, tokenizer, " The sun.", "\nYes. ", max_new_tokens=24, system="Be kind.")
    assert "".join(session.reply("What is hot?")) == "The sun."
    assert "".join(session.reply("kind?")) == "Yes. "
    shown = [tokenizer.decode(prompt) for prompt in session.engine.prompts]
    begin = "Be kind. Human: What is hot? Assistant:"
    assert shown == [begin, f"{begin} The sun. Human: kind? Assistant:"]
    assert session.messages == [user("What is hot?"), assistant("The sun."), user("kind?"), assistant("Yes.")]


def test_the_oldest_rounds_are_cut_to_the_context_and_this_is_said_once(model, tokenizer, console):
    words = ["hot one", "hot two", "hot three", "hot four"]
    session = scripted(model, tokenizer, *["I am well."] * 4, console=console, max_new_tokens=24, system="Be kind.")
    for word in words:
        "".join(session.reply(word))
    longest = [len(prompt) for prompt in session.engine.prompts]
    assert max(longest) <= CONTEXT - 24
    shown = tokenizer.decode(session.engine.prompts[-1])
    assert shown == "Be kind. Human: hot three Assistant: I am well. Human: hot four Assistant:"
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["hot three", "hot four"]
    assert console.stream.getvalue().count("forgotten") == 1


def test_reset_forgets_all_but_the_system_message(model, tokenizer):
    session = scripted(model, tokenizer, "yes", "no", max_new_tokens=16, system="Be kind.")
    "".join(session.reply("hot"))
    session.reset()
    "".join(session.reply("cold"))
    assert tokenizer.decode(session.engine.prompts[1]) == "Be kind. Human: cold Assistant:"


def test_a_message_longer_than_the_context_is_refused_and_leaves_the_history_alone(model, tokenizer):
    session = scripted(model, tokenizer, "yes", "no", max_new_tokens=16)
    "".join(session.reply("hot"))
    with pytest.raises(InputError, match=r"too long: \d+ tokens, and only 48 fit.*was not sent"):
        session.reply("hot " * 100)
    assert session.messages == [user("hot"), assistant("yes")]
    assert len(session.engine.prompts) == 1


def test_an_answer_broken_off_is_kept_as_far_as_it_was_given(model, tokenizer):
    session = scripted(model, tokenizer, "The sun is hot.", "", max_new_tokens=16)
    pieces = session.reply("What?")
    begin = next(pieces) + next(pieces)
    pieces.close()
    assert "The sun is hot.".startswith(begin)
    assert session.messages == [user("What?"), assistant(begin.rstrip())]
    assert list(session.reply("and?")) == []
    assert len(session.messages) == 2  # an empty answer is no round


def test_programs_compile_once_per_length_bucket(model, tokenizer, console):
    session = scripted(model, tokenizer, *["yes"] * 4, console=console, max_new_tokens=8)
    for text in ("hot", "kind", "hot " * 35):
        session.messages.clear()
        list(session.reply(text))
    assert [len(p) > 32 for p in session.engine.prompts] == [False, False, True]
    assert console.stream.getvalue().count("compiling… ") == 2


def test_an_answer_ends_at_the_model_s_own_end_tokens_too_and_does_not_show_them(model, tokenizer):
    extra = tokenizer("!")["input_ids"][-1]
    ending = model.replace(config=model.config.replace(eos_token_id=(1, extra)))
    session = scripted(ending, tokenizer, "yes!", max_new_tokens=16)
    assert "".join(session.reply("hot")) == "yes"
    assert set(session.sampling.eos_ids) == {tokenizer.eos_token_id, 1, extra}


def test_a_short_context_halves_the_default_answer(model, tokenizer):
    assert ChatSession(model, tokenizer, ChatConfig.create(model="tiny")).sampling.max_new_tokens == CONTEXT // 2


@pytest.mark.parametrize("text", ["naïve 日本語 and 🙂🙃 end", "  two  spaces\n\nkept "])
def test_streamed_text_gives_whole_characters_and_every_space(tokenizer, text):
    stream = StreamedText(tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) // 2
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == stream.text == text.lstrip()


def test_half_a_character_at_the_end_is_given_out_at_last(tokenizer):
    stream = StreamedText(tokenizer)
    ids = tokenizer("hot 🙂")["input_ids"][:-1]
    assert "".join(stream.add(token) for token in ids) == "hot "
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("The sun. Human: hot", ("Human:",), "The sun. "),
        ("You are kind, Humans", ("Human:", "kindly"), "You are kind, Humans"),
        ("xaab", ("aa",), "x"),
        ("hot You are", ("You are", "hot"), ""),
        ("is aab", ("aaa", "ab"), "is a"),
    ],
)
def test_streamed_text_ends_before_a_stop_and_never_shows_a_part_of_one(tokenizer, text, stops, shown):
    stream, given = StreamedText(tokenizer, stops), ""
    for token in tokenizer(text)["input_ids"]:
        given += stream.add(token)
        assert shown.startswith(given)
    assert given + stream.finish() == stream.text == shown
    assert stream.stopped == (shown != text)


def test_an_answer_ends_at_a_stop_string_and_draws_no_more(model, tokenizer):
    session = scripted(model, tokenizer, "The sun. Human: hot", "no", max_new_tokens=24, stop_strings=("Human:",))
    drawn = session.engine.stream

    def counting(*args):
        session.left = list(drawn(*args))
        while session.left:
            yield session.left.pop(0)

    session.engine.stream = counting
    assert "".join(session.reply("What?")) == "The sun. "
    assert session.left
    assert session.messages == [user("What?"), assistant("The sun.")]
    assert "".join(session.reply("and?")) == "no"


def test_streamed_text_of_a_sentencepiece_tokenizer_keeps_spaces_and_byte_tokens():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁The", "▁sun", "ny", "▁"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    stream = StreamedText(tokenizer)
    first, second = ([vocab[f"<0x{b:02X}>"] for b in character.encode()] for character in "日本")
    pieces = [stream.add(i) for i in [vocab["▁The"], vocab["▁sun"], vocab["ny"], vocab["▁"], *first, *second]]
    assert pieces == ["The", " sun", "ny", " ", "", "", "日", "", "", "本"]


def lines(session, text, console, output=None):
    output = io.StringIO() if output is None else output
    talk(session, text if isinstance(text, list) else text.splitlines(keepends=True), output, console)
    return output.getvalue()


def test_lines_are_answered_until_quit(model, tokenizer, console):
    session = scripted(model, tokenizer, "yes", "no", "never", max_new_tokens=16)
    assert lines(session, "hot\n\n   \nkind\n/quit\nmore\n", console) == "yes\nno\n"
    assert console.stream.getvalue() == ""


def test_commands_are_not_sent_to_the_model(model, tokenizer, console):
    session = scripted(model, tokenizer, "yes", max_new_tokens=16)
    assert lines(session, "hot\n/help\n/wat now\n/reset\n", console) == "yes\n"
    said = console.stream.getvalue()
    assert "/reset  forget" in said and "no command /wat;" in said and "(conversation forgotten)" in said
    assert session.messages == []


def test_a_refused_message_is_told_and_the_conversation_goes_on(model, tokenizer, console):
    session = scripted(model, tokenizer, "yes", max_new_tokens=16)
    assert lines(session, "hot " * 100 + "\nkind\n", console) == "yes\n"
    assert "too long" in console.stream.getvalue()


class Interrupting(io.StringIO):
    """An output that receives a Ctrl-C after its first piece of text."""

    def write(self, text):
        super().write(text)
        if text != "\n" and self.tell() == len(text):
            raise KeyboardInterrupt
        return len(text)


def test_one_ctrl_c_stops_the_answer_and_the_conversation_goes_on(model, tokenizer, console):
    session = scripted(model, tokenizer, "The sun is hot.", "yes", max_new_tokens=16)
    shown = lines(session, "What?\nkind\n", console, Interrupting())
    kept, rest = shown.split("\n", 1)
    assert "The sun is hot.".startswith(kept) and len(kept) < 15 and rest == "yes\n"
    assert session.messages[1] == assistant(kept)


def test_two_ctrl_c_leave(model, tokenizer, console):
    session = scripted(model, tokenizer, "yes", "no", max_new_tokens=16)
    assert lines(session, [None, "hot", None, None, "kind"], console) == "yes\n"
    session = scripted(model, tokenizer, "The sun is hot.", "no", max_new_tokens=16)
    assert "no" not in lines(session, ["What?", None, "kind"], console, Interrupting())


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\tc\n\x9b\x7fd日") == "a[2Jb\tc\nd日"


def test_a_folder_is_chatted_with_through_pipes(model, tokenizer, tmp_path, capsys):
    save_pretrained(model, tmp_path, with_template(tokenizer, TemplateConfig("Q {prompt} A {response}")))
    config = parse(ChatConfig, ["--model", str(tmp_path), "--max-new-tokens", "6", "--temperature", "0"], "chat", "")
    output = io.StringIO()
    chat(config, io.StringIO("hot\nkind\n"), output)
    session = open_session(config)
    assert session.tokenizer.decode(encode_conversation(session.tokenizer, [user("hot")])) == "Q hot A"
    assert output.getvalue() == "".join(printable("".join(session.reply(text))) + "\n" for text in ("hot", "kind"))
    assert capsys.readouterr().out == ""


def test_an_explicit_prompt_template_counts_more_than_the_run_s(model, tokenizer, tmp_path):
    save_pretrained(model, tmp_path, with_template(tokenizer, TemplateConfig("raw")))
    session = open_session(ChatConfig.create(model=str(tmp_path), prompt_template="{prompt}>{response}"))
    assert session.tokenizer.decode(encode_conversation(session.tokenizer, [user("hot")])) == "hot>"


def test_what_a_user_types_opens_no_turn_and_text_in_another_encoding_is_named(model, tokenizer, tmp_path):
    session = scripted(model, tokenizer, "yes", max_new_tokens=16)
    "".join(session.reply("hot<eos>kind"))
    assert session.tokenizer.eos_token_id not in session.engine.prompts[0]
    with pytest.raises(InputError, match="half of a surrogate pair"):
        session.reply("hot \ud83d")
    (tmp_path / "latin1").write_bytes("caf\u00e9\n".encode("latin-1"))
    for errors in ("strict", "surrogateescape"):
        with (
            open(tmp_path / "latin1", encoding="utf-8", errors=errors) as stream,
            pytest.raises(InputError, match="standard input: byte 0xe9 is not valid UTF-8; convert"),
        ):
            list(read_lines(stream, interactive=False))


def test_models_that_cannot_chat_are_refused_by_name(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_session(ChatConfig.create(model=str(tmp_path / "nowhere")))
    save_pretrained(model, tmp_path / "run" / "ppo", tokenizer)
    with pytest.raises(InputError, match=f"run of all steps; its chat model is {tmp_path}/run/ppo"):
        open_session(ChatConfig.create(model=str(tmp_path / "run")))
    reward = tiny(len(tokenizer), head="scalar")
    save_pretrained(reward, tmp_path, tokenizer)
    with pytest.raises(InputError, match=f"{tmp_path} is a reward model or critic"):
        open_session(ChatConfig.create(model=str(tmp_path)))
    with pytest.raises(InputError, match="scalar head"):
        ChatSession(reward, tokenizer, ChatConfig.create(model="tiny"))
    with pytest.raises(InputError, match=f"tokenizer has {len(tokenizer)} tokens, the model only 40"):
        ChatSession(tiny(40), tokenizer, ChatConfig.create(model="tiny"))


def test_settings_that_cannot_work_are_refused_by_name(model, tokenizer):
    with pytest.raises(InputError, match=f"max_new_tokens={CONTEXT} leaves no room .* context of {CONTEXT}"):
        ChatSession(model, tokenizer, ChatConfig.create(model="tiny", max_new_tokens=CONTEXT))
    with pytest.raises(InputError, match=r"stop_strings.*empty"):
        ChatConfig.create(model="tiny", stop_strings=("",))
    for name, value in (
        ("repetition_penalty", 0.0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("max_new_tokens", 0),
        ("prompt_template", "{prompt}"),
    ):
        with pytest.raises(InputError, match=name):
            ChatConfig.create(model="tiny", **{name: value})
    with pytest.raises(InputError, match="model"):
        parse(ChatConfig, [], "chat", "")
