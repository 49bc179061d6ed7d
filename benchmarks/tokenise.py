"""CPU seconds of rendering and tokenising pairs: in one process, in two, from the cache.

    python benchmarks/tokenise.py PAIRS TOKENIZER

CPU time, so that a shared machine gives the same figures. PAIRS is read ten times over.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from fairlead.data import tokenize
from fairlead.data.records import load_records
from fairlead.data.render import Renderer
from fairlead.models.load import load_tokenizer
from fairlead.types import Preference

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(data: str, origin: str) -> None:
    pairs = load_records(data, Preference)[0] * 10
    tokenizer = load_tokenizer(origin)
    tokenizer.chat_template = CHATML
    for template in ("hh", "chat"):
        renderer = Renderer(tokenizer, template=template, max_length=1024)
        start = time.process_time()
        wanted = tokenize.trees(renderer, pairs)
        whole = time.process_time() - start
        texts = [renderer.prompt_text(pair.prompt) for pair in pairs]
        texts += [renderer.response_text(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
        start = time.process_time()
        tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        inside = time.process_time() - start
        before = os.times()
        forked = tokenize.trees(renderer, pairs, workers=2)
        after = os.times()
        parent = after.user + after.system - before.user - before.system
        children = after.children_user + after.children_system - before.children_user - before.children_system
        with tempfile.TemporaryDirectory() as folder:
            tokenize.trees(renderer, pairs, cache=folder)
            start = time.process_time()
            read = tokenize.trees(renderer, pairs, cache=folder)
            cached = time.process_time() - start
        assert wanted == forked == read
        tokens = sum(tree.num_tokens for tree in wanted[0])
        print(
            f"{template}: {len(pairs)} pairs, {tokens} tokens; one process {whole:.1f} s, of it in the tokenizer "
            f"{inside:.1f}; two: parent {parent:.1f}, children {children:.1f}; cache {cached:.1f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
