"""A WordPiece tokenizer as tables of numbers, for a graph that tokenises by look-ups.

The tables come from the tokenizer itself: it normalises and pre-tokenises each code point alone, which is enough because
BERT's normaliser and pre-tokenizer look at one character at a time. (The only exception is the order of combining marks: two
marks may swap if one is not an accent.) The pieces of the vocabulary become a trie over symbols, in which a walk finds the
longest piece at a place (Song et al. 2021, "Fast WordPiece Tokenization", without its failure links).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qadeploy.errors import InputError
from qadeploy.records import IntArray

# Symbols of normalised characters; those of the vocabulary follow.
LETTER, ALONE, SPACE = 0, 1, 2  # an unknown letter of a word; an unknown word of one character; white space
_FIRST = 3
# All code points except the surrogates and the empty planes 4 to 13.
_CODES = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, sys.maxunicode + 1))
_BAR = "|"


@dataclass(frozen=True, slots=True, eq=False)
class WordPiece:
    """``characters`` maps to rows of ``rows`` ``[rows, width]``: the symbols of a character, padded with -1.

    All other characters have row 0. ``alone`` ``[symbols]`` is 1 for symbols that are words by themselves. The trie: ``steps``
    maps state x symbols + symbol to the next state; states are 0 (nothing), 1 (start of a word), 2 (inside a word), ...;
    ``ids`` ``[states]`` is the token that a state completes, or -1. Words longer than ``longest_word`` symbols, and words that
    the pieces cannot form, are ``unknown_id``. ``longest`` is the length of the longest piece in symbols.
    """

    characters: dict[str, int]
    rows: IntArray
    alone: IntArray
    steps: dict[int, int]
    ids: IntArray
    unknown_id: int
    longest_word: int
    longest: int

    @property
    def symbols(self) -> int:
        """The number of symbols."""
        return len(self.alone)


def read_wordpiece(tokenizer: Tokenizer) -> WordPiece:
    """The tables of a tokenizer. Raises InputError, naming the tokenizer's kind, if it is not BERT's WordPiece."""
    return _read(tokenizer.to_str())


@lru_cache(maxsize=1)  # it takes seconds, and an export makes several bundles with one tokenizer
def _read(stored: str) -> WordPiece:
    tokenizer = Tokenizer.from_str(stored)
    model = check_wordpiece(tokenizer)
    prefix, vocabulary = model["continuing_subword_prefix"], model["vocab"]
    special = set(special_tokens(tokenizer))
    known = sorted({letter for piece in vocabulary if piece not in special for letter in piece})
    normal = _normalised(tokenizer)
    kind = _kinds(tokenizer, sorted({letter for text in normal.values() for letter in text} | set(known)))
    symbol = {letter: _FIRST + i for i, letter in enumerate(k for k in known if kind[k] != SPACE)}
    alone = np.zeros(_FIRST + len(symbol), dtype=np.int64)
    alone[ALONE] = 1
    alone[[place for letter, place in symbol.items() if kind[letter] == ALONE]] = 1
    characters, rows = _rows(normal, {k: symbol.get(k, v) if v != SPACE else SPACE for k, v in kind.items()})
    pieces = {piece: i for piece, i in vocabulary.items() if piece not in special}
    steps, ids, longest = _trie(pieces, prefix, symbol)
    return WordPiece(
        characters, rows, alone, steps, ids, vocabulary[model["unk_token"]], model["max_input_chars_per_word"], longest
    )


def check_wordpiece(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``model`` entry of a ``tokenizer.json``. Raises InputError, naming the kind, if it is not BERT's WordPiece."""
    stored = json.loads(tokenizer.to_str())
    model = stored["model"]
    kinds = {part: (stored[part] or {}).get("type", "none") for part in ("model", "normalizer", "pre_tokenizer")}
    if kinds != {"model": "WordPiece", "normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}:
        raise InputError(
            f"strings-in-graph: this model's tokenizer is {kinds['model']} with the normalizer {kinds['normalizer']} and the "
            f"pre-tokenizer {kinds['pre_tokenizer']}; only WordPiece with BertNormalizer and BertPreTokenizer can be "
            "written into a graph: use spans-in-graph, with a tokenizer library of your programming language"
        )
    return dict(model)


def _normalised(tokenizer: Tokenizer) -> dict[str, str]:
    """Each code point, normalised between bars, which keep combining marks apart."""
    normalise = tokenizer.normalizer.normalize_str
    letters = [chr(code) for codes in _CODES for code in codes if chr(code) != _BAR]
    texts = normalise(_BAR.join(letters)).split(_BAR)
    if len(texts) != len(letters):
        texts = [normalise(letter) for letter in letters]  # this normaliser changes bars
    return {_BAR: normalise(_BAR), **dict(zip(letters, texts, strict=True))}


def _kinds(tokenizer: Tokenizer, letters: list[str]) -> dict[str, int]:
    """Whether the pre-tokenizer takes a character as part of a word (LETTER), a word (ALONE) or neither (SPACE)."""
    line = "a" + "".join(letter + "a" for letter in letters)
    inside, alone = set[int](), set[int]()
    for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(line):
        if end - begin > 1:
            inside.update(range(begin, end))
        else:
            alone.add(begin)
    places = {letter: 1 + 2 * i for i, letter in enumerate(letters)}
    return {k: LETTER if at in inside else ALONE if at in alone else SPACE for k, at in places.items()}


def _rows(normal: dict[str, str], symbol: dict[str, int]) -> tuple[dict[str, int], IntArray]:
    rows: dict[tuple[int, ...], int] = {(LETTER,): 0}
    characters = {}
    for letter, text in normal.items():
        row = tuple(symbol[each] for each in text)
        if letter.isspace() and row and set(row) != {SPACE}:
            raise InputError(
                f"strings-in-graph: this tokenizer makes a token of the blank character U+{ord(letter):04X}, "
                "which no answer may begin with: use spans-in-graph"
            )
        place = rows.setdefault(row, len(rows))
        if place:
            characters[letter] = place
    width = max(len(row) for row in rows)
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for row, place in rows.items():
        table[place, : len(row)] = row
    return characters, table


def _trie(pieces: dict[str, int], prefix: str, symbol: dict[str, int]) -> tuple[dict[int, int], IntArray, int]:
    steps: dict[int, int] = {}
    ids = [-1, -1, -1]
    longest, symbols = 1, _FIRST + len(symbol)
    for piece, number in pieces.items():
        inside = piece.startswith(prefix) and len(piece) > len(prefix)
        text = piece.removeprefix(prefix) if inside else piece
        if not text or any(letter not in symbol for letter in text):
            continue  # no word contains white space
        state = 2 if inside else 1
        for letter in text:
            key = state * symbols + symbol[letter]
            if key not in steps:
                steps[key] = len(ids)
                ids.append(-1)
            state = steps[key]
        ids[state] = number
        longest = max(longest, len(text))
    return steps, np.asarray(ids, dtype=np.int64), longest


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that a tokenizer searches for in a text first, such as ``[SEP]``; a graph reads them as plain text."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]
