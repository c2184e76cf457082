"""Forms in which models write their choice, and what writes none."""

# ruff: noqa: RUF001 - punctuation of other languages
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sta_adapter.evaluation.answer_text import final_answer
from sta_adapter.evaluation.option_matching import named_option

TEXTS = ["left", "right", "up", "down"]
B = [
    # the label alone
    "B", "b", "B.", "b.", "(B)", "(b)", "b)", "[B]", "B)", "B:", " B \n", "'B'", '"B"', "“B”", "`B`", "<B>", "B!", "B?", "Ⓑ", "Ｂ", "（Ｂ）", "{B}",
    # with its text or a reason behind
    "B. right", "B) right", "(B) right", "B: right", "B - right", "B – right", "B — right", "B = right", "B right", "B (right)", "B.right",
    "B, because it goes right first", "B because the ball moves", "B\n\nIt goes left first, then right.", "B\nReason: A shows left.",
    "B; it is the only one", "b. right", "B. A ball moves to the right.", "B\tright", "B | right", "B, since A is wrong",
    "B. right\n\nExplanation:\nA. left is wrong.",
    # a sentence that leads in
    "The answer is B", "The answer is B.", "the answer is b.", "The correct answer is (B).", "The correct answer is: B. right",
    "Answer: B", "ANSWER: B", "Answer : (B)", "Answer - B", "Answer = B", "Answer:B", "Ans: B", "Ans. B", "Final answer: B", "answer is\nB",
    "The answer is option B.", "The best answer is the letter B.", "The answer would be B", "Correct option: B", "Option B", "option (B) right",
    "My choice is B.", "I choose B.", "I would go with B.", "I think it's B", "I think it is B because it goes left at first.", "It is B.",
    "B is correct.", "B is the right answer", "Option B is the correct one, A is not.", "So it is B", "Therefore, B.", "Response: B", "Solution: B",
    "The answer is most likely B", "The answer to this question is B", "The answer is A? No. The final answer is B.",
    "Best option: (B) right", "There is no doubt: the answer is B", "The answer must be \"B\"",
    # a reason in front
    "It goes left first, then right.\n\nB", "It goes left first, then right.\nB.", "The ball goes left, then right. Answer: B",
    "The ball moves left at first, so B", "It ends at the other side (B).", "left, then right → B", "left => right => B", "First left. Thus: (B)",
    "A shows left, so the answer is B.", "A is wrong. B is correct.", "It is not A but B.", "Not A. The answer is B.", "Option A is wrong, option B is correct.",
    "The final position is on the other side, so I choose option B.",
    # markdown
    "**B**", "*B*", "__B__", "_B_", "**B.** right", "**B. right**", "**Answer:** B", "**Answer: B**", "The answer is **B**.", "### B", "#### B", "> B", "- B",
    "```\nB\n```", "```B```", "```text\nB\n```", "## Answer\nB", "**Final Answer:** (B)", "Answer: *(B)*", "~~A~~ B", "* B",
    # boxes and LaTeX
    r"\boxed{B}", r"$\boxed{B}$", r"\boxed{\text{B}}", r"\boxed{(B)}", r"\boxed{B. right}", r"The answer is \boxed{B}.", r"A is left. \boxed{\textbf{B}}",
    r"\[\boxed{\mathrm{B}}\]", r"$B$", r"\(B\)", r"\text{B}", r"\fbox{B}", r"\boxed{A} no, \boxed{B}", r"\boxed{right}", r"\boxed{B",
    # tags, boxes of models, JSON
    "<answer>B</answer>", "<answer> B. right </answer>", "<answer>The answer is B</answer>", "<answer>B", "<final_answer>B</final_answer>", "[ANSWER]B[/ANSWER]",
    "<|begin_of_box|>B<|end_of_box|>", "<b>B</b>", "B<br>right", "B</s>", "B<|im_end|>", '{"answer": "B"}', '```json\n{"answer": "B"}\n```', "<p>B</p>",
    "<answer>A</answer> wait <answer>B</answer>",
    # reasoning blocks
    "<think>A. left? No.</think>\nB", "<think>\nA? It goes left.\n</think>\n\n**B**", "A. left? No.</think>B", "<thinking>A</thinking> The answer is B.",
    "<think>A</think><answer>B</answer>", "<reasoning>A or C</reasoning>(B)", "◁think▷A◁/think▷B", "<THINK>A</THINK>B", "[THINK]A[/THINK]B",
    "<think>answer: A</think>The answer is (B) right", "<think>A<think>C</think>D</think>B",
    # other languages
    "B。", "B、right", "答案是B", "答案：B", "答案是 (B)", "正确答案为B。", "选B", "我选择B。", "选项B", "【B】", "「B」", "B是正确的", "答えはBです。", "正解：B", "정답은 B입니다.",
    "정답: B", "La respuesta es B.", "La respuesta correcta es la B.", "Opción B", "La réponse est B.", "« B »", "La bonne réponse est « B ».", "Die Antwort ist B.",
    "Antwort: B", "Die richtige Antwort ist „B“.", "B ist richtig.", "B, weil sie fällt", "A resposta é B.", "Letra B", "La risposta è B.", "Ответ: B", "الإجابة: B", "उत्तर: B",
    "Jawaban: B", "Đáp án: B", "Cevap: B", "Odpowiedź: B", "Svar: B",
    # in quotes, and behind a hyphen
    "The answer is 'B'.", "The correct option is 'B'", "I choose 'B' because it moves.", "{'answer': 'B'}", "answer='B'", "Answer:-B", "Ans: -B", "‘B’ is correct",
    # with signs that nobody sees, or pictures
    "B\u200b", "\ufeffB", "\u200eB\u200f", "B\x00", "\u200bThe answer is B.", "✅ B", "B ✅", "👉 B", "➡️ B. right", "B 😊", "▁B", "The answer is 👉🏽 B",
    # each option judged
    "A. left ❌\nB. right ✅\nC. up ❌\nD. down ❌", "A ✗ B ✓ C ✗", "A. left - incorrect\nB. right - correct\nC. up - incorrect", "A: no\nB: yes\nC: no\nD: no",
    "(A) left: incorrect. (B) right: correct.", "A) left - False\nB) right - True", "A. left (incorrect)\nB. right (correct)", "A. left (wrong)\n**B. right (correct)**", "A. left\nB. right ✓\nC. up", "A. left\nB. right (correct)\nC. up", "Not A. Correct answer: B", "We have A and C. Correct is option B.", "A. left (correct?) No. The answer is B.",
    "A and C are wrong, so B.", "A, C and D are incorrect. Option B.",
    # other words in front or behind
    "Definitely B.", "Clearly B", "Most likely B.", "Probably B, it goes right.", "Prediction: B", "Result: (B)", "ASSISTANT: B", "Conclusion: **B**", "B fits best.",
    "B rather than A", "B instead of A", "B not A", "B appears to be correct",
    # in words
    "right", "Right.", "RIGHT", "It moves right", "The ball moves to the right.", "It moves right, not left.", "**right**", "It is not left. It is right.",
]  # fmt: skip
NONE = [
    # nothing said
    "", " \n", ".", "?", "...", "**", "()", "Answer:", "The answer is", r"\boxed{}", "<answer></answer>", "<|im_end|>",
    # reasoning without an end, or with nothing behind
    "<think>It is B", "<think>The answer is B.</think>", "<think>A? B?</think>\n\n", "<thinking>\\boxed{B}</thinking>",
    # several
    "A or B", "A and B", "A, B", "A/B", "AB", "ABCD", "(A) or (B)", "A. left\nB. right\nC. up\nD. down", "A. left B. right C. up D. down", "Both A and B",
    "Either A or B", "The answer is A or B", "Answer: A, C", "Answer: C/D", "Answer: (A) and (C)", "I choose A and C", "left or right", "It moves left, then right.", "A和B", "A 或 B", "答案是A和B",
    "Option A or option B", "The options are (A) left and (B) right.", "A & B", "B, C and D", r"\boxed{A, B}", "<answer>A and B</answer>", "A\nB",
    # denied
    "Not B", "not B.", "It is not B.", "The answer is not B.", "I don't think it's B", "B is wrong.", "B is not correct.", "(B) is incorrect", "Option B is wrong.", "Neither A nor B",
    "It is not left.", "Neither left nor right", "It doesn't move right.", "Anything but not right", "不是B", "Nicht B", "B is not the answer.", "B? No.", "B isn't right.",
    "I would choose A... wait, actually B.", "A or possibly B", "A, or B", "A and C are wrong", "A, C and D can be ruled out", "A - incorrect", "B (wrong)", "Incorrect: B", "A: correct\nB: correct", "A ✅ B ✅",
    # nothing that is an option
    "E", "(E)", "Answer: F", "I don't know", "I cannot determine the answer from the video.", "None of the above", "All of the above", "N/A", "n/a", "Sorry, I can't help with that.",
    "The video shows a cat.", "A man walks", "A bird flies away.", "a ball", "I am not sure.", "Because it moves", "Bright", "B-roll footage", "Upwards", "downstairs", "the answer is a secret",
    "The answer is a man walking", "Answer: a bird", "I think a dog", "Camera movement", "Could be anything", "B2", "3D", "B's hand", "Does it move?", "C++", "B_2", "U.S.A.",
    "I see a person with A B-side record",
]  # fmt: skip


@pytest.mark.parametrize("said", B)
def test_forms_that_name_b(said):
    assert named_option(said, "ABCD", TEXTS) == 1


@pytest.mark.parametrize("said", NONE)
def test_forms_that_name_nothing(said):
    assert named_option(said, "ABCD", TEXTS) is None


@pytest.mark.parametrize(
    ("said", "labels", "texts", "index"),
    [
        ("A. left", "ABCD", TEXTS, 0),
        ("The answer is A because it moves", "ABCD", TEXTS, 0),
        ("The answer is A", "ABCD", TEXTS, 0),
        ("The answer is A.", "ABCD", TEXTS, 0),
        ("A\n\nA man walks to the left.", "ABCD", TEXTS, 0),
        ("A is correct", "ABCD", TEXTS, 0),
        ("The answer is: A man walks.", "AB", ["A dog runs.", "A man walks."], 1),
        ("a man walks", "AB", ["A dog runs.", "A man walks."], 1),
        ("A. A man walks.", "AB", ["A man walks.", "A dog runs."], 0),
        ("A dog runs and a man walks", "AB", ["A dog runs.", "A man walks."], None),
        ("I", "ABCDEFGHI", (), 8),
        ("I think so", "ABCDEFGHI", (), None),
        ("AX", "ABCD", (), None), ("B Xright", "ABCD", TEXTS, None),  # a letter inside of another word
        ("**Yes**, it does.", ["yes", "no"], (), 0),
        ("<think>no</think>Yes", ["yes", "no"], (), 0),
        ("The answer is no.", ["yes", "no"], (), 1),
        ("No, it is not moving.", ["yes", "no"], (), 1),
        (r"\boxed{\text{No}}", ["yes", "no"], (), 1),
        ("No idea.", ["yes", "no"], (), None),
        ("I think yes", ["yes", "no"], (), 0), ("There is no ball, so no.", ["yes", "no"], (), 1), ("I see no ball", ["yes", "no"], (), None),
        ("I think no ball moves", ["yes", "no"], (), None), ("I don't think yes.", ["yes", "no"], (), None), ("so yes or no", ["yes", "no"], (), None),
        ("No doubt, yes.", ["yes", "no"], (), 0), ("No. Without doubt.", ["yes", "no"], (), 1),
        ("Yes and no", ["yes", "no"], (), None), ("Yes, no question about it.", ["yes", "no"], (), 0), ("Yes, and no other.", ["yes", "no"], (), 0),
        ("yes/no", ["yes", "no"], (), None),
        ("Not sure", ["yes", "no"], (), None),
        ("nobody", ["yes", "no"], (), None),
        ("1.", ["Option 1", "Option 2"], TEXTS[:2], 0),
        ("**Option 2:** right", ["Option 1", "Option 2"], TEXTS[:2], 1),
        ("option 1 or option 2", ["Option 1", "Option 2"], TEXTS[:2], None),
        ("1.5 seconds", ["Option 1", "Option 2"], TEXTS[:2], None),
        ("10", ["Option 1", "Option 2"], TEXTS[:2], None),
        ("-2", ["Option 1", "Option 2"], TEXTS[:2], None),
        ("2 times", "ABC", ["1", "2", "3"], 1), ("It is 2.", "ABC", ["1", "2", "3"], 1), ("2, not 3", "ABC", ["1", "2", "3"], 1),
        ("2.5", "ABC", ["1", "2", "3"], None), ("-2", "ABC", ["1", "2", "3"], None), ("1,000", "ABC", ["1", "2", "3"], None), ("2:30", "ABC", ["1", "2", "3"], None),
        ("1-3", "ABC", ["1", "2", "3"], None), ("2/3 of them", "ABC", ["1", "2", "3"], None),
        ("B. False", "AB", ["True", "False"], 1), ("B: No", "AB", ["Yes", "No"], 1), ("B - no", "AB", (), 1), ("(B) Incorrect", "AB", ["Correct", "Incorrect"], 1),
        ("B is not moving", "AB", ["is moving", "is not moving"], 1),
        ("The correct caption is Sentence A.", ["Sentence A", "Sentence B"], TEXTS[:2], 0),
        ("向左移动", "AB", ["向左", "向右"], 0),
        ("物体先向左，然后向右", "AB", ["向左", "向右"], None),
        ("没有向左", "AB", ["向左", "向右"], None),
        ("B. 向右", "AB", ["向左", "向右"], 1),
        ("**It moves left.**", "AB", ["It moves left.", "It moves right."], 0),
        ("x", "AB", ["", ""], None),
        ("⬆️", "AB", ["⬇️", "⬆️"], 1), ("It moves ↗.", "AB", ["↖", "↗"], 1), ("👍", "AB", ["👎", "👍"], 1), ("😀", "AB", ["👎", "👍"], None),
        ("left", "AB", ["left", "left"], None),
        # a label that is part of an option's text
        ("(B) a", "ABC", ["b", "a", "v"], 1), ("B. c", "ABC", ["a", "c", "b"], 1), ("B", "ABC", ["b", "a", "v"], 1), ("A. Plan B", "AB", ["Plan B", "Plan A"], 0),
        ("The answer is (B) Vitamin C.", "ABC", ["Vitamin A", "Vitamin C", "Vitamin B"], 1), ("D. Both A and B", "ABCD", ["left", "up", "none", "Both A and B"], 3),
        ("The answer is C major.", "ABC", ["C major", "D major", "A minor"], 0), ("Group C is correct.", "ABC", ["Group C", "Group A", "Group B"], 0),
        ("(B) Vitamin C is wrong", "ABC", ["Vitamin A", "Vitamin C", "Vitamin B"], None), ("B and C are wrong, so A.", "ABC", ["Vitamin B", "C", "x"], 0),
        ("(A) Vitamin C are wrong", "AC", ["Vitamin C", "x"], None), ("left is wrong", "AB", TEXTS[:2], None), ("left ❌ right ✅", "AB", TEXTS[:2], 1),
        ("Right cannot be; it moves left", "AB", TEXTS[:2], 0),
        ("A time-lapse. In a normal speed video it takes days.", "ABC", ["normal speed", "time-lapse", "slow motion"], None), ("Not plan B, but A", "AB", ["Plan A", "Plan B"], 0),
        ("B", [], [], None),
        ("B", "AB", [], 1),
        *((said, ["A. up", "B. down"], (), 1) for said in ("B", "B.", "b", "(B)", "B. down", "**B**: down", "down", "It goes down.", "The answer is B.", "B, because it falls")),
        *((said, ["(A) up", "(B) down"], (), 1) for said in ("B", "(B)", "B. down", "down")),
        ("A or B", ["A. up", "B. down"], (), None), ("C", ["A. up", "B. down"], (), None),
        ("A", ["A. up", "A. down"], (), None), ("A. down", ["A. up", "A. down"], (), 1), ("A", ["A. up", "down"], (), None),
    ],
)  # fmt: skip
def test_other_options(said, labels, texts, index):
    assert named_option(said, labels, texts) == index


@given(st.text(max_size=60), st.sampled_from("ABCD"))
def test_a_reasoning_block_changes_nothing(thought, label):
    thought = thought.replace("<", "").replace("[", "").replace("◁", "")
    assert named_option(f"<think>{thought}</think>{label}", "ABCD", TEXTS) == "ABCD".index(label)


@given(st.text(alphabet="ABCDabcd .,:;()[]{}<>*_#`\\\n/=-答案是'\"leftrigh\x00", max_size=80))
def test_any_text_is_read_or_not(said):
    assert named_option(said, "ABCD", TEXTS) in (None, 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("**Left.**", "Left."),
        ("<think>hm</think>\n left ", "left"),
        ("a_b c*d*", "a_b cd"),
        ("1. x\n\n2. y", "1. x\n2. y"),
        ("", ""),
        ("👍", "👍"),
        ("yes 👍", "yes"),
        ("turn it by 90° ➡️", "turn it by 90° ➡"),
    ],
)
def test_final_answer(said, answer):
    assert final_answer(said) == answer
