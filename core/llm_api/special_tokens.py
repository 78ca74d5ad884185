"""Whether texts spell a tokenizer's special tokens, such as `<eos>` or `[INST]`.

Tokenizers of Hugging Face's libraries look for the texts of their special tokens in every text;
add_special_tokens=False only stops them from adding more. A claim about "<eos>" then contains the token that ends
texts. Engines do not list their special tokens, but these can be recognized: a word with marks around it that is one
token. No vocabulary learned from text joins a word and such marks; only added tokens do, some of which are tags of
HTML.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Final

from core.llm_api.tokens import LEADS, Tokenizer

LIKE_SPECIAL: Final = re.compile(r"<[^<>\s]{0,60}\w[^<>\s]{0,60}>|\[[^\[\]\s]{0,60}\w[^\[\]\s]{0,60}\]")
HTML: Final = re.compile(
    r"</?(a|b|i|p|s|u|h[1-6]|br|hr|em|ol|ul|li|td|th|tr|dd|dl|dt|tt|sub|sup|div|del|ins|pre|img|code|span|strong|"
    r"small|strike|table|thead|tbody|tfoot|caption|center|blockquote)/?>"
)
BEGINNING: Final = "<s>"
ENDING: Final = "</s>"
"""Special in vocabularies whose BOS is <s>; tags of HTML in others."""


async def special_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, prefix: Collection[int] = (), meant: str = ""
) -> dict[int, str]:
    """The first special token's text in each text that has one, by the text's position.

    prefix: the tokens before every prompt. meant: a text whose special tokens are intended, such as a template; those
    are left out. Finds nothing for an engine that is asked in text.
    """
    by_text = [LIKE_SPECIAL.findall(text) for text in texts]
    candidates = [text for text in dict.fromkeys(chain.from_iterable(by_text)) if text not in meant]
    if not candidates:
        return {}
    lead = LEADS[0]  # some tokenizers put a space before whatever they are given
    tokens = await tokenizer.tokenize([lead, lead + BEGINNING, *(lead + text for text in candidates)])
    if tokens is None:
        return {}
    before, beginning, *spelled = tokens
    one_token = {text for text, ids in zip(candidates, spelled, strict=True) if ids[:-1] == before}
    tags = {text for text in one_token if HTML.fullmatch(text)}
    if beginning[:-1] == before and beginning[-1] in prefix:
        tags -= {BEGINNING, ENDING}
    special = one_token - tags
    return {at: text for at, found in enumerate(by_text) if (text := next((f for f in found if f in special), ""))}
