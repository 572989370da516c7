"""A tiny model that reads and writes text: what clients need that send words, not token ids.

The weights are random, as in ``launch/models/tiny.py``; the vocabulary is made for that. A random
model never closes a string or a number by itself, so most of its words end what they are in:
letters or digits, and then a quote, a brace, a comma, a dot, a space or a new line. Below a grammar
it comes to an end after a few tokens, whatever its weights are.

    python -m launch.models.text --out DIR --window 128
"""

import itertools
import json
import random
from pathlib import Path

from launch.models.kept import kept
from launch.models.tiny import make_model, parse_args
from sglang_ext.arguments import Parser, output_folder, whole

VOCABULARY = 32_000
END = 2

_TEXT = """
the of and a to in is you that it he was for on are as with his they at be this have from
or one had by word but not what all were we when your can said there use an each which she
do how their if will up other about out many then them these so some her would make like
him into time has look two more write go see number no way could people my than first been
call who its now find long down day did get come made may part over new take only little
work know place year live me back give most very after thing our just name good sentence
man think say great where help through much before line right too means old any same tell
boy follow came want show also around form three small set put end does another well large
must big even such because turn here why ask went men read need land different home us
move try kind hand picture again change off play spell air away animal house point page
letter mother answer found study still learn should world quick brown fox jumps lazy dog
capital france city story text json schema
"""
COMMON = _TEXT.split()
"""Words that are one token each: an English text has fewer tokens than letters."""

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _marks_behind_space() -> list[str]:
    """White space that a mark or a digit ends: a random model would go on with it. Braces that
    close are the most of them."""
    spaces = [
        ["".join(space) for space in itertools.product("ĠĊĉ", repeat=n)] for n in (1, 2, 3, 4)
    ]
    marks = ['"', ",", ":", ':"', "}", *"123456789"]
    words = [space + mark for some in spaces[:3] for space in some for mark in marks]
    return words + [space + "}" for space in spaces[3]]


def _closing_words(count: int, taken: set[str]) -> list[str]:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    ends = ['"', '"', '"', '"}', "}", "}", ",", ".", "Ġ", "Ċ"]  # space, new line
    words: list[str] = []
    while len(words) < count:
        inside = "0123456789" if rng.random() < 0.2 else letters
        first = rng.choice("123456789") if inside[0] == "0" else rng.choice(letters)
        word = first + "".join(rng.choice(inside) for _ in range(rng.randint(1, 4)))
        word += rng.choice(ends)
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def write_tokenizer(out: Path, vocabulary: int = VOCABULARY) -> None:
    """A byte-level tokenizer of exactly so many words, beside the weights in ``out``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    taken, merges = set(words), []
    # words behind a space first: merges apply in this order
    for word in [*("Ġ" + common for common in COMMON), *COMMON]:
        for n in range(1, len(word)):
            if word[: n + 1] not in taken:
                merges.append((word[:n], word[n]))
                words.append(word[: n + 1])
                taken.add(word[: n + 1])
    words += (word for word in _marks_behind_space() if word not in taken)
    words += _closing_words(vocabulary - len(words), taken)
    vocab = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(out)


def make_text_model(out: Path, window: int = 128, seed: int = 0) -> Path:
    """Write the model and its tokenizer into ``out`` and return it."""
    make_model(
        parse_args(
            [
                *("--out", str(out), "--window", str(window), "--seed", str(seed)),
                *("--vocab", str(VOCABULARY), "--context", "65536"),
            ]
        )
    )
    config = json.loads((out / "config.json").read_text())
    # what a grammar ends with
    config["eos_token_id"] = END
    (out / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(out)
    return out


def ready_made_text(window: int = 128) -> Path:
    """The model with this window, made unless it is there; kept between runs."""
    out = Path(__file__).resolve().parents[2] / ".models" / f"text-{window}"
    return kept(out, lambda place: make_text_model(place, window))


def main() -> None:
    """Command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=output_folder, required=True, help="directory to write")
    parser.add_argument("--window", type=whole(2), default=128, help="sliding window, tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make_text_model(args.out, args.window, args.seed))


if __name__ == "__main__":
    main()
