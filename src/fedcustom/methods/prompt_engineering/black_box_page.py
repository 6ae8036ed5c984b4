"""The page beside an exported soft prompt: how it is loaded."""

from __future__ import annotations

from ...models.configuration import HUB_NAMES
from ...models.load import Base
from ..tuning.model_card import offline


def soft_prompt_page(base: Base, *, encoder: bool) -> str:
    """The text of ``README.md``."""
    name = HUB_NAMES.get(base.name, base.path)
    head = (
        f"# A soft prompt for {name}\n\nThe model's weights are unchanged; `prompt.json` says how labels "
        "are written.\n"
    )
    page = ENCODER_PAGE if encoder else DECODER_PAGE
    return offline(head + page.replace("MODEL", name), base)


DECODER_PAGE = """Load the prompt, in this folder, with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("MODEL")
model = PeftModel.from_pretrained(base, ".").eval()
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("a text", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=64)[0]
print(tokenizer.decode(output, skip_special_tokens=True))
```
"""

ENCODER_PAGE = """`soft_prompt.safetensors` holds the virtual tokens (`soft_prompt`), which go before
the embedded input; the mean is taken over the states of the input's own tokens:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained("MODEL").eval(), AutoTokenizer.from_pretrained(".")
prompt = load_file("soft_prompt.safetensors")["soft_prompt"].unsqueeze(0)
ids = tokenizer("a text", return_tensors="pt")["input_ids"]
with torch.no_grad():
    inputs = torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)
    vector = model(inputs_embeds=inputs).last_hidden_state[:, prompt.shape[1] :].mean(dim=1)
print(torch.nn.functional.normalize(vector, dim=1))
```
"""
