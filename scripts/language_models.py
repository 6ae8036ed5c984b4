"""How well language models know English: bits per byte of two texts, an answer, and how long loading takes.

    python scripts/language_models.py builtin:lm builtin:smollm2
    FEDCUSTOM_CACHE=build/empty python scripts/language_models.py builtin:smollm2   # with its conversion

Bits per byte compare models of different tokenizers: the summed loss of all tokens but the first, in bits,
over the bytes of the text behind the first. The answer is greedy, through the tokenizer's chat template.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from fedcustom.data.examples import LearningTask
from fedcustom.models.configuration import locate
from fedcustom.models.load import Base, load_base
from fedcustom.models.settings import ModelSettings

STORY = (
    "The road went down between the hills until it came to a small town by the sea. It was late in the "
    "afternoon, and the people were coming home from their work. An old man sat before the door of his house "
    "and looked at the ships in the harbour. He had been a sailor in his youth, and told the children many "
    "stories of the places he had seen. They did not believe all of them, but they loved to hear him speak. "
    "When the lamps were lit and the night came on, their mothers called them, and they ran away laughing "
    "through the narrow streets."
)
FACTS = (
    "A vaccine trains the immune system to recognise a virus or a bacterium before the body meets it. Most "
    "vaccines contain a weakened form of the pathogen, or a protein from its surface, and are given by "
    "injection. White blood cells produce antibodies against that protein, and some of them remain for "
    "years. If the same pathogen enters the body later, these cells respond within hours, so that the "
    "infection is mild or is not noticed at all. The first vaccine was developed by Edward Jenner in 1796 "
    "against smallpox, a disease that was declared eradicated in 1980 after a campaign of the World Health "
    "Organization."
)
QUESTION = "What is the capital of France?"


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, text: str) -> float:
    """Mean loss in bits over the bytes of a text, each token given those before it."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    bits = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) / math.log(2)
    return bits / (len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode()))


@torch.inference_mode()
def answer(base: Base, question: str) -> str:
    """What the model says to a question; to the question as a text where it has no chat template."""
    if base.tokenizer.chat_template:
        inputs = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
    else:
        inputs = base.tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    output = base.model.generate(**inputs, do_sample=False, max_new_tokens=24)
    said: str = base.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="built-in models, local folders or hub ids of decoders")
    parser.add_argument("--text", type=Path, help="a file with a text in the place of the two paragraphs")
    parser.add_argument("--question", default=QUESTION)
    given = parser.parse_args()
    texts = {"story": STORY, "facts": FACTS}
    if given.text:
        texts = {given.text.name: given.text.read_text(encoding="utf-8")}
    print(
        "model",
        *(f"bits per byte, {name}" for name in texts),
        "seconds to convert",
        "seconds to load",
        "answer",
        sep="\t",
    )
    for name in given.models:
        begun = time.perf_counter()
        locate(name)
        found = time.perf_counter()
        base = load_base(ModelSettings(base=name, device="cpu"), LearningTask("generation"), 0)
        loaded = time.perf_counter()
        bits = [bits_per_byte(base.model, base.tokenizer, text) for text in texts.values()]
        row = (
            *(f"{value:.3f}" for value in bits),
            f"{found - begun:.1f}",
            f"{loaded - found:.1f}",
            repr(answer(base, given.question)),
        )
        print(name, *row, sep="\t")


if __name__ == "__main__":
    main()
