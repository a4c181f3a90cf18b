"""A classifier that looks at the mean over a text's tokens, on the body of any family of transformers'.

Models that embed sentences are trained that way (Reimers and Gurevych 2019). Their first token says little, and is what
transformers' own heads look at. ``mean_pooled(config)`` gives the class, whose ``from_pretrained`` loads the folder.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(PreTrainedModel):  # type: ignore[misc]
    """A body and a linear head on the mean of its last hidden states; a class of its own for each family."""

    body_class: ClassVar[Any] = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body = self.body_class(config)
        if getattr(body, "pooler", None) is not None:  # looks at the first token, and would train on noise alone
            body.pooler = None
        setattr(self, self.base_model_prefix, body)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SequenceClassifierOutput:
        """Logits (B, L) of texts (B, T) that are padded where the mask is 0. peft names more inputs, all None."""
        body = getattr(self, self.base_model_prefix)
        hidden_BTD = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BT1 = attention_mask[:, :, None].to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
        return SequenceClassifierOutput(logits=self.classifier(mean_BD))


def mean_pooled(config: Any) -> type[MeanPooledClassifier] | None:
    """The class for a configuration's family; None where transformers has no body of that family."""
    family = type(config)
    body = MODEL_MAPPING.get(family, None)
    if body is None:
        return None
    own = {"base_model_prefix": body.base_model_prefix, "config_class": family, "body_class": body}
    return type(MeanPooledClassifier.__name__, (MeanPooledClassifier,), own)
