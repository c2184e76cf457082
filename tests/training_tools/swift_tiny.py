"""The tiny base has other ids for pictures and clips than Qwen2-VL, which ms-swift takes for given; and a reward for GRPO."""

from swift.rewards import ORM, orms
from swift.template.templates.qwen import Qwen2VLTemplate

Qwen2VLTemplate.image_token_id, Qwen2VLTemplate.video_token_id = 6, 7


class Differs(ORM):
    """Another reward for each answer of a group, so that there is something to learn."""

    def __call__(self, completions, **kwargs):
        return [float(index) for index, _ in enumerate(completions)]


orms["differs"] = Differs
