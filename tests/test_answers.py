"""The answer checker. Each docstring names the bug it guards."""

import random
import re
import time

import pytest

from data import answers_equal, extract_answer, is_correct

EQUAL = [
    ("8,000", "8000"),
    ("9{,}500", "9500"),
    (r"9\,500", "9500"),
    ("10.", "10"),
    ("10.00", "10"),
    (".5", "0.5"),
    ("18 miles", "18"),
    ("$18", "18"),
    (r"\$18", "18"),
    ("18 cm", "18"),
    ("18cm", "18"),
    (r"5\text{ cm}", "5"),
    (r"15\mbox{ cm}^2", "15"),
    ("18 dollars per day", "18"),
    (r"90^\circ", "90"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("3/4", "0.75"),
    (r"\frac34", "3/4"),
    (r"\dfrac{3}{4}", ".75"),
    ("1 1/2", "1.5"),
    (r"-3\frac12", "-3.5"),
    ("−5", "-5"),
    ("-$5", "-5"),
    ("5", "5/1"),
    ("1e3", "1000"),
    (r"1.5 \times 10^3", "1500"),
    ("10^{5}", "100,000"),
    ("x = 5", "5"),
    (r"x \in [2,5]", "[2,5]"),
    (r"\text{(B)}", "B"),
    ("(B)", "b"),
    (r"\text{even}", "Even"),
    (r"\left( 3, \frac{\pi}{2} \right)", "(3,pi/2)"),
    ("(100,101)", "(100, 101)"),
    (r"\sqrt2", r"\sqrt 2"),
    (r"\frac{1}{2}\sqrt{3}", r"\frac{\sqrt3}{2}"),
    ("2x+3", "3 + 2x"),
    ("x^2-2x+1", "(x-1)^2"),
    ("5-2i", "-2i+5"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    ("1,2", "2, 1"),
    (r"\{1,2\}", "1,2"),
    (r"-2\text{ or }3", "3,-2"),
    (r"\begin{pmatrix} \frac12 \\ 3 \end{pmatrix}", r"\begin{bmatrix}0.5\\3\end{bmatrix}"),
    ("7:30", "7:30"),
    (r"(-\infty,-2) \cup (-1,1]", r"(-\infty, -2)\cup(-1,1]"),
    ("2516_8", "2516_{8}"),
    ("<<9*2=18>>18", "18"),
    (r"\angle ABC = 55^\circ", r"55^\circ"),
    ("a_{10} = 103", "103"),
    ("5 = x", "x = 5"),
    (r"\frac14 = 0.25", "1/4"),
    (r"\frac{5}{13} \approx 0.38", r"\frac{5}{13}"),
    (r"x = \text{(B)}", "B"),
    ("f(x) = 2x", "y = 2x"),
    ("x = 3, x = -1", "-1, 3"),
    (r"x = 3 \text{ or } x = -1", "-1,3"),
    ("3√10", r"3\sqrt{10}"),
    ("√51", r"\sqrt{51}"),
    ("13 m", "13"),
    ("27 °F", "27"),
    (
        r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    ),
    ("\\begin{bmatrix} 1 \\\\\n 2 \\\\ \\end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("£5", r"\pounds 5"),
    (r"\left[\begin{matrix} 1 \\ 2 \end{matrix}\right]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("x**2 - 3", "x^2-3"),
    (r"11,\! 111,\! 100", "11,111,100"),
    (r"\cot(x)", r"\cot x"),
    ("2^(4950)", "2^{4950}"),
    (r"a < b \leq 5", r"a < b \le 5"),
    (r"\mathbf{v} = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("5; 7", "5,7"),
    ("5:30 PM", r"5\!:\!30 \text{ p.m.}"),
    ("05:00", "5:00"),
    (r"25\pi\text{ cm}^3", r"25\pi"),
    (r"\boldsymbol{5}", "5"),
    (r"\quad 5", "5"),
    (r"1.2\text{ million}", "1200000"),
    ("2y", "2 y"),
    ("x² + 1", "x^2+1"),
    ("18 dollars", "18 euros"),
    ("5 or 9", "9 or 5"),
    (r"5 \text{ or } 9", "5, 9"),
    ("5 L", "5 liters"),
    ("2600g", "2600"),
    ("18元", "18"),
    ("18 км/ч", "18"),
    ("minus 5", "-5"),
    ("½", "0.5"),
    ("1½", "1.5"),
    ("10⁻²", "0.01"),
    ("1011₂", "1011_2"),
    ("70\u00a0000", "70000"),
    ("1\u202f200\u202f000", "1,200,000"),
    ("１８", "18"),
    ("١٨", "18"),
    ("2√3", r"2\sqrt3"),
    (r"\(18\)", "18"),
    (r"\( \frac{\pi}{3} \)", r"\frac{\pi}{3}"),
    ("€18", "18"),
    ("₹18", "18"),
    ("x ≤ 5", r"x \le 5"),
    ("9 x 2 = 18", "18"),
    ("5:30 p.m.", "5:30 pm"),
    (r"(1\frac12, 3)", "(1.5, 3)"),
    ("sqrt 51", r"\sqrt{51}"),
    ("sqrt(51)", r"\sqrt{51}"),
    ("3 thousand", "3,000"),
    (r"1011 \text{ (base 2)}", "1011_2"),
]
UNEQUAL = [
    ("x+y=1", "10^{-400}=0"),
    ("12", "1 2"),
    ("1,2", "12"),
    ("-5", "5"),
    ("50%", "0.5"),
    ("", ""),
    (r"\text{}", ""),
    ("0", ""),
    ("$", "$"),
    ("(1,2)", "(2,1)"),
    ("(0,1)", "[0,1]"),
    ("(1,2)", "1"),
    ("3", "3,4"),
    ("even", "odd"),
    ("CBAD", "ABCD"),
    ("x+1", "x+2"),
    ("5x", "5"),
    ("1/3", "0.333"),
    (
        "99999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999",
        "9999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999",
    ),
    ("1e999999999", "2"),
    ("7:30", "7:3"),
    ("9^{999999999}", "3"),
    ("*", "* *"),
    ("2516_8", "2516"),
    ("B", "C"),
    ("1/0", "2/0"),
    (r"\begin{matrix}1&2\end{matrix}", r"\begin{matrix}1\\2\end{matrix}"),
    ("x + y = 0", "x + 2y = 0"),
    ("x = 3", "y = 3"),
    ("AB=9, CD=4", "AB=4, CD=9"),
    (r"\frac{12}{3}\tan x", r"\frac{1}{23}\tan x"),
    (r"\tan x = 2x", r"\cot x = 2x"),
    ("x + y + z = 0", "0"),
    (r"x \ge 5", r"(5,\infty)"),
    ("x > 5", r"(-\infty,5)"),
    ("x < y", "(0,y)"),
    ("x = 5", "x = 6"),
    ("10:30", "5:15"),
    ("12:30 am", "12:30 pm"),
    ("6:10", "3:5"),
    ("5 million", "5 thousand"),
    ("5 million", "5"),
    ("2x", "2y"),
    ("3ab", "3ac"),
    ("5 or 9", "5"),
    ("5 or 9", "9"),
    (r"5\pi", "5"),
    ("5!", "5"),
    ("5 - 3", "5"),
    ("5²", "5"),
    ("1101_2", "1101_3"),
    ("5x^{26}-15x^9+x", "5x^{26}-15x^8+x"),
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{97}}"),
    (r"\frac{1}{2^{98}}", "0"),
    ("10 000", "10"),
    (r"\frac35, -\frac{12}{5}", r"\frac35"),
    ("-6s^4 + 11s", "-6"),
    (r"30m \sqrt{m}", "30"),
    ("5t", "5"),
    (r"5 \pm 3", "5"),
    (r"x \ge 5", "5"),
]
RIGHT = [
    ("#### 5 apples", "5"),
    ("#### 1,234.50", "1234.5"),
    ("#### -3", "-3"),
    ("#### 10.", "10"),
    ("#### $10", "10"),
    ("1\n#### 3\nno\n#### 4", "4"),
    ("#### 7\n#### ", "7"),
    ("#### 9 * 2 = 18", "18"),
    ("72, in total", "72"),
    ("#### 18\n\nThanks", "18"),
    (r"\boxed 2", "2"),
    ("The answer is 18.", "18"),
    ("The answer is $18 per day.", "18"),
    ("**18**", "18"),
    ("The final answer is $18$. I hope it is correct.", "18"),
    ("Answer:\n\n18", "18"),
    ("**Answer:** 18", "18"),
    ("So she makes $18 every day.", "18"),
    ("She buys 3.\nShe makes\n$18 every day.\nWell done!", "18"),
    ("#### Step 3: 5 + 5\nThe total = 18.", "18"),
    (r"\boxed{18}. So the answer is correct.", "18"),
    (r"So the answer is $\frac{3}{4}$ of it.", "3/4"),
    (r"Thus $x=\frac34$.", ".75"),
    ("A: 26", "26"),
    ("The answer is (B).", r"\text{(B)}"),
    ("The answer is even.", r"\text{even}"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt2}"),
    ("#### 5", "2+3 = <<2+3=5>>5\n#### 5"),
    ("It is 5-8=-3", "-3"),
    ("2516", "2516_8"),
    (r"\boxed{1011 \text{ (base 2)}}", "1011_2"),
    (r"\fbox{18}", "18"),
    (r"so \boxed{14}. Can it be? The answer is yes!", "14"),
    ("🎉 The answer is 34! 🎉", "34"),
    ("The answer is `34`.", "34"),
    ('The answer is "34".', "34"),
    ("She has 3.\n#### 18</s>", "18"),
    ("The answer is 3, since 4 - 1 = 3 boxes and 2 - 1 = 1.", "3"),
    ("The answer is:\n\\[\nx+1\n\\]", "1+x"),
    ("She makes **$18** from 9 eggs.", "18"),
    ("**3. Total:** 9 * 2 = 18", "18"),
    (r"\cos^{2}{(\alpha)}", r"\cos^2\alpha"),
    ("Thus\n<answer>x + 1</answer>", "1+x"),
    ("#### Cost of 3 apples\n\n3 * 5 = 15", "15"),
    (r"It is $\$18.90$.", "18.90"),
    ("Answer: x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + 1", "1 + x^3 + x^4 + x^5 + x^6 + x^7 + x^8"),
    ("#### 2600g.", "2600"),
    ("#### 5 L", "5"),
    ("答案：18", "18"),
    ("Ответ: 18 рублей.", "18"),
    ("16 - 3 - 4 = 9, 9 * 2 = 18", "18"),
    ("The answer is minus 5.", "-5"),
    ("The answer is 18 because 9 * 2 = 18 and 3 + 4 = 7.", "18"),
    ("The answer is $5$ or $9$.", "5 or 9"),
    ("the final answer is #### 30. Jeff walks 30 miles in a week.", "30"),
    (r"#### \(18\)", "18"),
    (r"The answer is \(\frac{\pi}{3}\).", r"\frac{\pi}{3}"),
    ("So it is 28%.", r"28\%"),
    ("**70\u00a0000**", "70000"),
    ("5 cars drove through the jam in the first 15 minutes.", "5"),
    ("So 5 cars drove through in the first 15 minutes.", "5"),
    ("In 3 weeks she makes $18.", "18"),
    ("They had 12 + 6 = 18 eggs for 3 days.", "18"),
    ("Total: 18 eggs in 3 days", "18"),
    ("So a total of 5 cars drove through in 15 minutes.", "5"),
    ("The answer is 18 given that 9 * 2 = 18.", "18"),
    ("#### 70’000", "70000"),
    ("Either 5 or 9\n#### either 5 or 9", "5, 9"),
    ("#### 18元。", "18"),
    ("The answer is 18 (9 * 2 = 18, 3 + 4 = 7).", "18"),
    ("Réponse finale : 18 €", "18"),
    ("#### 180 cm²", "180"),
    ("3×10⁸", "300000000"),
    ("The answer is either 5 or 9.", "5 or 9"),
    ("#### 1.2 million dollars", "1,200,000"),
    (r"\boxed{1.2\text{ million}}", "1200000"),
    ("#### 18 dollars (9 * 2 = 18)", "18"),
    ("#### Rs. 18", "18"),
    (r"Answer: $34\text{ sq. units}$", "34"),
    ("The answer is even since 4 is even.", r"\text{even}"),
    ("The answer is $x+1$ for all $x$.", "1+x"),
    ("The answer is $5$ and $9$.", "5, 9"),
]
WRONG = [
    ("", "5"),
    (None, "5"),
    (5.5, "5"),
    ("#### ", "5"),
    ("#### ,", "5"),
    ("#### 15", "5"),
    ("-5", "5"),
    ("3/4", "4"),
    (r"\boxed{(3,5)}", "3"),
    (r"\boxed{5 or 3}", "5"),
    (r"\boxed{", "5"),
    (r"\boxed{5x}", "5"),
    ("5", ""),
    ("5", None),
    ("#### 18\n#### 19", "18"),
    ("hello", "5"),
    (r"\boxed{}", r"\boxed{}"),
    ("It costs $5 more than $6", "5"),
    (r"\boxed{2517}", "2516_8"),
    (r"\boxed{2516_9}", "2516_8"),
    ("#### Cost of 3 apples\n\n3 * 5 = 15", "3"),
    ("The answer is 4, since 4 - 1 = 3 boxes.", "3"),
    (r"Then 13. \fbox{14}", "13"),
    ("The answer is minus 5.", "5"),
    ("The answer is 18 because 9 * 2 = 18 and 3 + 4 = 7.", "7"),
    ("The answer is $5$ or $9$.", "5"),
    ("The answer is $5$ or $9$.", "9"),
    ("#### 5 dollars or 9 dollars", "5"),
    ("#### x = 5 or x = 9", "9"),
    ("#### x = 5, x = 9", "9"),
    ("#### 5 and 9", "5"),
    ("#### 5, 9", "9"),
    ("5 cars drove through the jam in the first 15 minutes.", "15"),
    ("#### 10:30", "10"),
    ("#### 1.2 million", "1.2"),
    ("#### 70 000", "70"),
    (r"\boxed{2\sqrt{5}}", "2"),
    (r"\boxed{x^2+5}", "5"),
    (r"\boxed{(5,x)}", "5"),
    ("#### 28.5%", "28"),
    ("x - 5", "5"),
    ("#### 5 <= x", "5"),
    (r"\boxed{5!}", "5"),
    (r"\boxed{1011 \text{ (base 3)}}", "1011_2"),
    ("#### 9 x 2", "9"),
    ("either 5 or 9", "9"),
    ("x = 5 and x = 9", "9"),
    ("#### 5k", "5"),
    ("#### 1.2M", "1.2"),
    ("The answer is 10-18", "18"),
    ("#### 18:30", "18"),
    ("#### 3 1/2", "3"),
    (r"\boxed{3 - 2\sqrt{2}}", "3"),
    ("5 (x + 1)", "5"),
    ("So the total is 2^2.75.", "2.75"),
]


# What changed with the rule that what is not understood whole is not equal, kind by kind.
KINDS_RIGHT = [
    ("#### $30 - $6 = $24", "24"),  # money taken for LaTeX
    ("The answer is $7 + $8 = $15.", "15"),
    ("Answer: $20+$30=$50", "50"),
    ("<think>\nThe answer is 30? No.\n</think>\n\n24", "24"),  # thoughts before the answer
    (r"<think>\boxed{3}</think>" + "\nThe answer is 24.", "24"),
    ("The answer is not 12 but 14.", "14"),  # negation
    ("The answer isn't 12 but 14.", "14"),
    ("The answer is not 3, it is 4.", "4"),
    ("The answer is 12, not 14.", "12"),
    ("The answer is 6 times 4, which is 24.", "24"),  # operations in words
    ("The answer is 10% of 70, which is 7.", "7"),
    ("The answer is 3 plus 4, so 7.", "7"),
    ("#### 5k", "5000"),  # magnitudes
    ("#### $2.5K", "2500"),
    ("#### 3 30-minute episodes", "3"),  # a number before a number
    ("#### 2:00 pm", "2"),
    (r"\boxed{18 \div 3}", "6"),
    ("90\\text{ square\nunits}", "90"),  # a line break in a gold
    (r"\boxed{90\text{ square" + "\nunits}}", "90"),
]
KINDS_WRONG = [
    ("The answer is not 12 but 14.", "12"),
    ("The answer is not 5.", "5"),
    ("The answer isn't 5.", "5"),
    ("The answer is 6 times 4, which is 24.", "6"),
    ("#### 6 times 4", "6"),
    ("The answer is 10% of 70.", "10"),
    ("#### twice 5", "5"),
    ("#### less than 5", "5"),
    ("#### 2 hours 15 minutes", "2"),  # two units
    ("#### 1 hour and 30 minutes", "1"),
    ("#### 5 dollars 20 cents", "5"),
    (r"\boxed{3}", "3R^2"),  # a letter as unit
    (r"\boxed{5}", "5x"),
    (r"\boxed{1}", "1,i,-i"),  # a list for its first member
    (r"\boxed{2}", "(2,3)"),
    (r"\boxed{3}", "3:1"),  # ratios, shares
    ("#### 3 out of 4", "3"),
    ("#### 3 in 4", "3"),
    ("#### 4 to 6", "4"),
    ("#### 4 lakh", "4"),
    ("#### 3 dozen", "3"),
    ("Total cost = (16 * 0.75) * $2\n\nNow, let's calculate the final answer.", "24"),
    ("She pays 5 + 6 dollars.", "11"),  # sums left to the checker
    ("5 + 3 = 8\n#### none", "8"),  # a marked answer that is none
    ("5 + 3 = 8\nThe answer is unknown.", "8"),
]


@pytest.mark.parametrize("response, gold", KINDS_RIGHT)
def test_understood_whole(response, gold):
    """Answers that the rules promise to read."""
    assert is_correct(response, gold), extract_answer(response)


@pytest.mark.parametrize("response, gold", KINDS_WRONG)
def test_not_understood_whole(response, gold):
    """A number of the answer taken for the answer: a false "right" is imitated."""
    assert not is_correct(response, gold), extract_answer(response)


VALUES = r"""
18 -3 3/4 0.75 1,200 \frac{3}{4} 2\sqrt{3} \frac{\pi}{3} (3,4) [0,2) 1,-2,7 x^2+3x-1 \{1,4\} 3+4i
\begin{pmatrix}1\\5\end{pmatrix} y=2x+7 \sin^2x 2^{10} 5\text{cm} x\in[2,5]
""".split()


@pytest.mark.parametrize("gold", VALUES)
def test_form_is_nothing_and_value_is_all(gold):
    """An answer refused for its spacing, or taken with another digit, sign, element or letter."""
    forms = [f"${gold}$", f" {gold} ", f"{gold}.", gold.replace("frac", "dfrac")]
    forms.append(gold.replace("(", r"\left( ").replace(")", r" \right)"))
    for form in forms:
        assert is_correct(rf"\boxed{{{form}}}", gold), form
    others = ["-" + gold, gold.rpartition(",")[0], gold.replace("x", "z"), gold.replace("+", "-")]
    for i, char in enumerate(gold):
        if char.isdigit():
            others.append(gold[:i] + str((int(char) + 1) % 10) + gold[i + 1 :])
    for other in others:
        if other not in (gold, "", "1", "-x\\in[2,5]"):
            assert not is_correct(rf"\boxed{{{other}}}", gold), other


@pytest.mark.parametrize("a, b", EQUAL)
def test_two_formats_of_one_answer(a, b):
    """'10.' counted as wrong for '10' turns a good step into a first pit."""
    assert answers_equal(a, b)
    assert answers_equal(b, a)
    assert answers_equal(a, a)
    assert is_correct(rf"Hence it is $\boxed{{{a}}}$.", b)


@pytest.mark.parametrize("a, b", UNEQUAL)
def test_different_answers(a, b):
    """Lost minus signs, pairs read as numbers, 0 = 0 for two answers that could not be read."""
    assert not answers_equal(a, b)
    assert not answers_equal(b, a)


@pytest.mark.parametrize("response, gold", RIGHT)
def test_right_responses(response, gold):
    """The first marker instead of the last, a unit or a second sentence taken for the answer."""
    assert is_correct(response, gold), extract_answer(response)


@pytest.mark.parametrize("response, gold", WRONG)
def test_wrong_responses(response, gold):
    """Any number somewhere in the text accepted; no answer equal to no answer."""
    assert is_correct(response, gold) is False, extract_answer(response)


def test_no_answer_is_none():
    """A whole unfinished solution passed on as if it were an answer."""
    assert extract_answer("First he buys 3.\nThen he") is None
    assert extract_answer("") is None
    assert extract_answer(" 42 ") == "42"
    assert extract_answer("42", bare=False) is None
    assert extract_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"


def test_only_the_end_is_searched():
    """Minutes spent on a response of a million characters, or its beginning read instead."""
    long = "\n" + "and so on " * 10_000 + "\n"
    assert extract_answer("#### 5" + long + "#### 18") == "18"
    assert extract_answer("#### 5" + long) is None


# --- properties ---

NUMBERS = ["18", "-3", "1,234,567", "0.75", "1.50", "3/4", "-7/2", "70000", "2 1/2", r"\frac{3}{4}"]
EXPRESSIONS = [
    r"\frac{\pi}{3}",
    r"2\sqrt{3}",
    "x^2 + 1",
    "(3, 4)",
    r"[0, \infty)",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    r"\text{even}",
    "1, -2",
    "2516_8",
    "y = 2x + 3",
    "7:30",
    "3 + 4i",
    "5 or 9",
]
UNITS = [
    " cm",
    "g",
    " L",
    " dollars",
    " km/h",
    "%",
    r"\%",
    r"^\circ",
    r"\text{ cm}^2",
    " 元",
    "個",
    " рублей",
]
STYLES = [
    "The answer is: {}",
    "The answer is {}.",
    "#### {}",
    "#### {}. That is all.",
    "So\n**Answer:** {}",
    r"Thus it is $\boxed{{{}}}$. I hope it is correct.",
    "The final answer is ${}$. I hope it is correct.",
    r"The answer is \({}\).",
    "2 + 3 = 5\n#### {}\n\nBye",
    "<answer>{}</answer>",
    "The answer is {} because 3 + 4 = 7.",
    "{}",
]


@pytest.mark.parametrize("style", STYLES)
def test_every_style_states_its_answer(style):
    """A way to write the final answer that is not read, or read as something else."""
    for gold in NUMBERS + EXPRESSIONS:
        assert is_correct(style.format(gold), gold), gold
        for other in NUMBERS + EXPRESSIONS:
            if not answers_equal(gold, other):
                assert not is_correct(style.format(gold), other), (gold, other)


def test_golds_differ():
    """Two different answers of the lists above taken for one, or 3/4 for two numbers."""
    golds = NUMBERS + EXPRESSIONS
    for i, a in enumerate(golds):
        equal = {b for b in golds[:i] if answers_equal(a, b)}
        assert equal <= {"0.75", "3/4"}, a


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_changes_nothing(unit):
    """'2600g' is not read as 2600, or '18元' because its unit is not in the Latin script."""
    for number in NUMBERS:
        assert answers_equal(number + unit, number)
        assert answers_equal(number, number + unit)
        assert is_correct(f"#### {number}{unit}", number)
        assert is_correct(rf"\boxed{{{number}{unit}}}", number)


def test_text_changes_nothing():
    r"""'\text{18}' or '\mathbf{x}' compared with its command."""
    for gold in ["18", "1,234,567", "0.75", "even", "B", "x"]:
        for command in ["text", "mathrm", "mbox", "textbf", "mathbf"]:
            assert answers_equal(rf"\{command}{{{gold}}}", gold)


def test_another_number_is_never_equal():
    """Digits that are cut off, signs that are lost, a comma read as a point."""
    rng = random.Random(0)
    styles = ["{}", "{:,}", "${:,}", "{}.00", "{} dollars", "{:,} cm", r"\boxed{{{}}}", "#### {:,}"]
    for _ in range(1000):
        n = rng.randrange(-99_999, 99_999)
        other = rng.choice([-n, n + rng.randrange(1, 9), n * 10, n // 10, n * 1000, n + 0.5])
        text = rng.choice(styles).format(n)
        assert is_correct(text, str(n)), text
        if other != n:
            assert not is_correct(text, str(other)), (text, other)


def test_fractions_and_decimals_are_one_number():
    """A decimal compared as text with the fraction that it is."""
    rng = random.Random(0)
    for _ in range(500):
        n = rng.randrange(-99_999, 99_999)
        d = rng.choice([1, 2, 4, 5, 8, 10])
        assert answers_equal(f"{n / d:,}", rf"\frac{{{n}}}{{{d}}}")
        assert answers_equal(f"{n}/{d}", rf"$\dfrac{{{n}}}{{{d}}}$")
        assert not answers_equal(f"{n}/{d}", f"{n + 1}/{d}")


# --- hostile text ---

FRAGMENTS = r"""
1e999 18 -3.5 1,234,567 1/3 \frac{1}{2} \frac12 \frac \sqrt[3]{2} \boxed{ } { #### answer: $ %
10^10^10 9**9**9 2^{ ( ) [ ] x x^2+1 \text{cm} \begin{pmatrix}1\\2\end{pmatrix} \pi π ٣ ½ ² e i =
trillion inf \ \\ , ; 日本 <<3*4=12>> << A: or and 0/0 1/0 ^ _ ! | \le ≤ \left( \cdot * / + \pm :
""".split()
FRAGMENTS += [
    "The answer is",
    "\n",
    "\0",
    "\ud800",
    "\u2028",
    "5:30 pm",
    "9" * 290,
    "(" * 60,
    "0" * 50,
]


def random_text(rng):
    parts = rng.choices(FRAGMENTS, k=rng.randrange(1, 12))
    if rng.random() < 0.2:
        parts += [chr(rng.randrange(0x3000)) for _ in range(30)]
    return rng.choice(["", " "]).join(parts)


def test_fuzzed_answers():
    """Exceptions from odd text, verdicts that depend on the order, answers unlike themselves."""
    rng = random.Random(0)
    for _ in range(1000):
        a = random_text(rng)
        b = random_text(rng)
        assert answers_equal(a, b) == answers_equal(b, a), (a, b)
        assert is_correct(a, b) in (True, False)
        answer = extract_answer(a)
        if answer and re.search(r"[a-z\d]", answer):
            assert answers_equal(answer, answer), answer


PIECES = r"""
#### \boxed{ { ( 1, - \frac{ ((1, \text{ $ 9 \sqrt{ x^ 2^9^ 1e9 << \pm \{a, \( = 1+ ^2 1,000, =1,0
a: answer 1/ . \left( & \\ ! | 0 7 √ ½ ** 1: \frac1 $1 \$1 \[ ≤ x<
""".split()
PIECES += [
    "\n",
    " ",
    "answer is ",
    "the answer is $",
    "1 or ",
    "5 and ",
    "9 million ",
    "#### abc ",
    "x=1 ",
]


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_text_is_cheap(piece):
    """A regular expression or a power that takes minutes on a degenerate sample ends the run."""
    for size in (1_000_000, 250):
        text = piece * (size // len(piece))
        for hostile in (text, "#### " + text, r"\boxed{" + text + "}"):
            start = time.process_time()
            extract_answer(hostile)
            answers_equal(hostile, hostile + "1")
            is_correct(hostile, "5")
            is_correct(hostile, r"\frac{x}{2}")
            is_correct("5", hostile)
            assert time.process_time() - start < 0.5, size
