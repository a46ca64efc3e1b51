"""GRPO† + teacher response: on a hard question a correct teacher response stands in the group in
place of a wrong rollout, as if the student had written it. The one method of policy gradients that
trains on a teacher's tokens.
"""

from zppo.algorithm.composition import with_teacher_response
from zppo.algorithm.methods.base import Method

METHOD = Method(
    name="grpo_replay_teacher_response",
    title="GRPO† + teacher response",
    summary=(
        "plain prompts, with a correct teacher response among the answers to hard ones, which come "
        "back"
    ),
    replay=True,
    teacher_draws="hard",
    composer=with_teacher_response,
    teacher_tokens=True,
)
