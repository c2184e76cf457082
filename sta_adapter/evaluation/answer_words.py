"""Patterns of words around an option's label in a written answer: "the answer is", "is correct", "not", in several languages."""

# ruff: noqa: RUF001 - punctuation and words of other languages
from __future__ import annotations

import re

CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: a letter beside them stands alone
WORD = rf"[^\W_{CJK}]"
RIGHT_SIGNS, WRONG_SIGNS = "✅✓✔☑", "❌✗✘✖"
EDGES = " \t\n\"'“”‘’„«»「」『』【】[](){}<>.,;:!?。、" + RIGHT_SIGNS
DASHES = "-–—"
TIED = "[-'’_]"  # ties a letter to a word
NOT_NEGATIVE = r"(?!(?<=[-−])\d)"
NUMBER_AFTER = rf"{NOT_NEGATIVE}(?!(?<=\d[.,:/])\d)"  # where a number is no part of a longer one: -2, 1.2, 1,200, 1:20
NUMBER_BEFORE = r"(?!(?<=\d)[-−.,:/]\d)"
_QUOTES = r"[\s\"'“”‘’„«»「」『』【】\[\](){}]*"
_IS = r"(?:is|are|was|would be|must be|ist|es|est|é|è|jest|är)"

_ANSWER = (
    r"(?:\b(?:answers?|ans|response|solution|respuesta|solución|réponse|antwort|lösung|resposta|risposta|antwoord|ответ|odpowiedź"
    r"|odpověď|cevap|yanıt|jawaban|svar|vastaus|đáp án)\b|\bans\.|απάντηση|תשובה|جواب|إجابة|الإجابة|الجواب|پاسخ|उत्तर|คำตอบ"
    r"|答案|答え|回答|正解|解答|정답|답|答)"
)
_CHOICE = (
    r"(?:\b(?:option|choice|sentence|caption|letter|alternative|candidate|opción|letra|choix|opção|alternativa|opzione|lettera|вариант|optie|opcja"
    r"|seçenek|pilihan|lựa chọn)\b|选项|選項|選択肢|보기)"
)
_FILLER = (  # what may stand between such a word and the label
    r"(?:[\s:=>\-–—→\"'“”‘’„«»「」『』【】\[\](){},]"
    r"|\b(?:is|are|was|be|to|this|question|the|would|should|will|must|most|likely|probably|definitely|clearly|therefore|thus|then"
    r"|simply|best|correct|right|final|option|choice|letter|i|choose|es|est|ist|é|è|la|le|el|der|die|das|correcta|correcto|correcte"
    r"|richtige|corretta|правильный|является|jest|är|on|là|adalah)\b"
    r"|هي|هو|है|คือ|είναι|应该是|應該是|是|为|為|は、|は|은|는|选项|選項|选|選)"
)
ANSWER_IS = re.compile(rf"{_ANSWER}{_FILLER}*\Z", re.IGNORECASE)
FINALLY = re.compile(rf"(?:\bfinal {_ANSWER}|最终答案|最終答案|最終的な答え){_FILLER}*\Z", re.IGNORECASE)
CUE = re.compile(
    rf"(?:{_CHOICE}|\b(?:it|that|this) is\b|\b(?:it|that)['’]s\b"
    r"|\b(?:actually|is|be|so|therefore|thus|hence|but|choose|chose|chosen|pick|picked|select|selected|go with|going with|say|guess|think"
    r"|definitely|certainly|clearly|obviously|surely|probably|likely"
    r"|believe|elijo|choisis|wähle|scelgo|escolho)\b|[→➡>]|选择|選擇|故选|选|選|而是)"
    rf"{_FILLER}*\Z",
    re.IGNORECASE,
)
IS_RIGHT = re.compile(
    rf"{_QUOTES}(?:\b{_IS}\b(?: (?:the|clearly|la|le|die|der|most likely|probably))*"
    r" (?:correct|right|best|true|answer|one|richtig|correct[ao]|correcte|juste|bonne|cert[ao]|giusta|esatta)\b"
    r"|是?(?:正确|正確|对的|對的)|が正|は正|[이가] ?(?:정답|맞))",
    re.IGNORECASE,
)
NOT = re.compile(
    r"\b(?:not|never|neither|nor|no|none|cannot|except|excluding|exclude|eliminate[sd]?|ruled? out|rather than|instead of|other than"
    r"|unlike|unless|unsure|wrong|incorrect|nicht|kein\w*|pas|ni|non|не|ikke|inte|niet|nie)\b|n['’]t\b|不|没|沒|并非|排除|아니",
    re.IGNORECASE,
)
NO_DOUBT = re.compile(r"\b(?:no doubt|without (?:a )?doubt|not only)\b", re.IGNORECASE)
CLAUSE = re.compile(r"[.,;:!?\n。、]|\b(?:but|sondern|sino|mais|ma)\b|而是", re.IGNORECASE)
DENIED = re.compile(  # behind a label
    rf"{_QUOTES}(?:\b(?:{_IS}|seems|looks|can be)\b(?: \w+ly\b| also\b)? ?(?:not\b|wrong|incorrect|false|exclud|eliminat|ruled|out\b"
    r"|impossible|unlikely|nicht|falsch|pas\b|faux|fausse|errat)|(?:is|does|was|can|could)n['’]t\b"
    r"|\b(?:cannot|can not|does not|did not|no es|non è|não é)\b|不|错|錯|は違|ではな|は間違)|[^\w\n]*\? *(?:no|not|wrong)\b"
    rf"|[\s\])\"'”’]*[-–—:=(][\s(]*(?:wrong|incorrect)\b|[^\w\n{RIGHT_SIGNS}]*[{WRONG_SIGNS}]",
    re.IGNORECASE,
)
DENIED_TOGETHER = re.compile(rf"{_QUOTES}\b(?:are|were|can|cannot|do|have)\b", re.IGNORECASE)  # "A and C are wrong"
VERDICT = re.compile(  # behind an option, where each is judged: "A. left - incorrect"
    r"(?:[\s\])\"'”’]*[-–—:=(|][\s(]*(?:(?P<right>correct|true|yes)|incorrect|wrong|false|no)"
    r"(?=(?: answer| option| choice)?\s*(?:[.,;)\]|\n]|\Z))"
    rf"|[^\w\n{RIGHT_SIGNS}{WRONG_SIGNS}]*(?:(?P<sign>[{RIGHT_SIGNS}])|[{WRONG_SIGNS}]))",
    re.IGNORECASE,
)
MARK = re.compile(  # what shows that a letter is no word of a sentence
    rf"{_QUOTES}(?:\Z|[.。](?!\d|{WORD}\.)|[:,;!?、|=–—→>\n)\]]|-[\s>]|[{CJK}]"
    r"|(?:because|since|as|or|and|due|is|was|seems|which|would|given|matches|describes|shows|best|fits|appears|rather than|instead of|not (?-i:[A-Z]\b)"
    r"|ist|es|est|é|è|weil|porque|car)\b)",
    re.IGNORECASE,
)
JOINED = re.compile(  # between two labels that are named together
    r"[\s\"'“”‘’(){}\[\].:]*(?:[,;/&+、|]\s*)?(?:\b(?:and|or|nor|und|oder|et|ou|y|o|e)\b|和|或|与|と|か)?"
    r"(?:\s*\b(?:possibly|maybe|perhaps|even|also)\b)?"
    rf"[\s\"'“”‘’(){{}}\[\]]*{_CHOICE}?[\s\"'“”‘’(){{}}\[\]]*",
    re.IGNORECASE,
)
NO_ANSWER = re.compile(
    r"no (?:idea|clue|answer|information|way|opinion|comment|option|match|choice|preference)\b", re.IGNORECASE
)
