"""How InternVideo2.5-Chat's conversations are written: special tokens, system messages, and the chat template."""

from __future__ import annotations

from sta_adapter.errors import CheckpointError

IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
IMAGE, VIDEO = "<image>", "<video>"
"""What stands for a picture and for a clip in a rendered conversation, before the processor puts tokens there."""

ASSISTANT = "<|im_start|>assistant\n"
END = "<|im_end|>"
SYSTEM_MESSAGES = {
    "internvl2_5": "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",  # noqa: RUF001
    "internlm2-chat": "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",  # noqa: RUF001
}
"""What the model was told of itself in training, by the published names of the conversation's form."""


def _form(name: str) -> tuple[str, str]:
    """What ends each turn, and the system's words, of a conversation's form."""
    if name not in SYSTEM_MESSAGES:
        raise CheckpointError(f"template is {name!r}; expected one of {', '.join(SYSTEM_MESSAGES)}.")
    return f"{END}\n" if name == "internvl2_5" else END, SYSTEM_MESSAGES[name]


def chat_template(name: str, bos: str) -> str:
    """The Jinja template of one of `SYSTEM_MESSAGES`; clips and pictures are parts of type "video" and "image"."""
    end, system = _form(name)
    end = end.replace("\n", "\\n")
    return (
        "{{ '" + bos + "' }}"
        "{% if not messages or messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\n" + system + end + "' }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}{{ '" + IMAGE + "\\n' }}"
        "{% else %}{{ '" + VIDEO + "' }}{% endif %}{% endfor %}{% endif %}"
        "{{ '" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def conversation(name: str, turns: list[tuple[str, str]], question: str, system: str | None = None) -> str:
    """A conversation that waits for an answer, as `chat` writes it, without the token in front."""
    end, usual = _form(name)
    said = [("system", usual if system is None else system)]
    said += [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    written = "".join(f"<|im_start|>{role}\n{text}{end}" for role, text in [*said, ("user", question)])
    return written + ASSISTANT


def image_tokens(count: int) -> str:
    """What the model reads in the place of a picture, or of a frame, of that many visual tokens."""
    return f"{IMAGE_START}{IMAGE_TOKEN * count}{IMAGE_END}"


def frames_prefix(frames: int, tokens: int) -> str:
    """What the model reads in the place of a clip: each frame with its number, a line each."""
    return "".join(f"Frame{number}: {image_tokens(tokens)}\n" for number in range(1, frames + 1))
