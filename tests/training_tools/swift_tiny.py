"""The tiny base has other ids for pictures and clips than Qwen2-VL, which ms-swift takes for given."""

from swift.template.templates.qwen import Qwen2VLTemplate

Qwen2VLTemplate.image_token_id, Qwen2VLTemplate.video_token_id = 6, 7
