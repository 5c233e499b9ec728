"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks, made here for any tokenizer and length.

``RulerTask(RulerConfig("ruler_vt", length=8192), tokenizer).sample(0)`` is a prompt with its
references, ``score`` the score of a reply. The length is RULER's: tokens of the prompt, the start
of the answer included, and of the answer's budget. Prompts are those of RULER as the evaluation
harness puts them, to the character; where the stock generators break off, loop, or leave the length
unfilled, the class of the task says what is done instead.
"""

from memdlm_jax.evaluation.ruler.config import TASKS, RulerConfig, TaskName
from memdlm_jax.evaluation.ruler.documents import QuestionSet, read_hotpot, read_squad
from memdlm_jax.evaluation.ruler.fitting import TokenCounter
from memdlm_jax.evaluation.ruler.oracle import oracle
from memdlm_jax.evaluation.ruler.task import RulerSample, RulerTask, string_match_part

__all__ = [
    "TASKS",
    "QuestionSet",
    "RulerConfig",
    "RulerSample",
    "RulerTask",
    "TaskName",
    "TokenCounter",
    "oracle",
    "read_hotpot",
    "read_squad",
    "string_match_part",
]
