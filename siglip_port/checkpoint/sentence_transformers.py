"""The files from which `SentenceTransformer(folder)` loads a saved encoder, with its pooling.

Source: sentence-transformers 6.2 `base/model.py` and `base/modules/transformer.py`. Without these
files, it takes the mean of the tokens.
"""

from __future__ import annotations

from typing import Any

from siglip_port.config import SigLipVisionConfig

MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
MODEL = "config_sentence_transformers.json"

TRANSFORMER_CLASS = "sentence_transformers.base.modules.transformer.Transformer"
POOLING_CLASS = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


def sentence_transformers_files(config: SigLipVisionConfig) -> dict[str, Any]:
    """Return the contents of the JSON files by name.

    With a pooling head, the embedding is its output; with mean pooling, the mean of the tokens. A
    model without pooling has tokens only: `encode` raises `KeyError: 'sentence_embedding'`. So does
    a NaFlex model with mean pooling, because sentence-transformers would average padding, too.

    Args:
        config: Architecture of the saved model.
    """
    output = ("last_hidden_state", "token_embeddings")
    if config.pooling_head:
        output = ("pooler_output", "sentence_embedding")
    modules = [{"idx": 0, "name": "0", "path": "", "type": TRANSFORMER_CLASS}]
    files: dict[str, Any] = {
        MODEL: {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        TRANSFORMER: {
            "transformer_task": "feature-extraction",
            "modality_config": {"image": {"method": "forward", "method_output_name": output[0]}},
            "module_output_name": output[1],
            # the pixels of `embed_images`; torchvision's differ by up to one level in 255
            "processor_kwargs": {"backend": "pil"},
        },
        MODULES: modules,
    }
    if config.mean_pooling and not config.naflex:
        modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": POOLING_CLASS})
        files[POOLING] = {"embedding_dimension": config.embed_dim, "pooling_mode": "mean"}
    return files
