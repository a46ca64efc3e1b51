r"""Units: 5 m/s is not 5 km/h, although both are the number 5.

The comparison of mathematics drops units, so that `5 cm` answers a gold `5`. Two answers that both
have a unit all of whose parts are known must have the same one, powers and quotients included.
Nothing is converted, and a unit that is not known contradicts nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

from msgspec import Struct

from zppo.grading.boxes import tidy, unstyled

_NAMES = """
in inch inches | ft foot feet | yd yard yards | mi mile miles | acre acres | ha hectare hectares
lb lbs | pound pounds | oz ounce ounces | t ton tons tonne tonnes
min minute minutes | h hr hrs hour hours | day days | week weeks | month months | year years yr yrs
gal gallon gallons | qt quart quarts | pt pint pints | cup cups | rpm | bit bits | B byte bytes
$ dollar dollars usd | cent cents ¢ | € euro euros eur | £ gbp | ¥ yen | ₹ rupee rupees
rad radian radians | °F fahrenheit | °C celsius | K kelvin kelvins | deg degree degrees °
"""
_PREFIXES = {
    "k": "kilo",
    "c": "centi",
    "m": "milli",
    "d": "deci",
    "M": "mega",
    "G": "giga",
    "n": "nano",
    "μ": "micro",
}
_METRIC = {
    "m": "meter metre", "g": "gram", "s": "second", "L": "liter litre", "J": "joule", "W": "watt",
    "V": "volt", "A": "ampere", "Hz": "hertz", "N": "newton", "Pa": "pascal", "Ω": "ohm",
    "mol": "mole", "eV": "electronvolt", "cal": "calorie",
}  # fmt: skip
_ALSO = {
    "l": "L", "ml": "mL", "cl": "cL", "dl": "dL", "sec": "s", "secs": "s", "hz": "Hz", "kj": "kJ",
    "kw": "kW", "KM": "km", "KG": "kg",
}  # fmt: skip
_COMPOUND = {
    "mph": ("mi", "h"),
    "kph": ("km", "h"),
    "kmh": ("km", "h"),
    "kmph": ("km", "h"),
    "fps": ("ft", "s"),
}
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_EITHER = ({"pound", "lb"}, {"pound", "£"})
"""Words that may be two units."""


def _known() -> dict[str, str]:
    units = {
        name: entry.split()[0]
        for entry in _NAMES.replace("\n", "|").split("|")
        for name in entry.split()
    }
    for (symbol, names), (prefix, word) in product(_METRIC.items(), [("", ""), *_PREFIXES.items()]):
        unit = units[prefix + symbol] = prefix + symbol
        units |= {word + name + plural: unit for name in names.split() for plural in ("", "s")}
    return units | {name: units[unit] for name, unit in _ALSO.items()} | {"min": "min"}


_UNIT_OF = _known()
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁻", "01234-")
_PLAIN = [
    (
        re.compile(
            r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\deg(?:ree)?(?![a-zA-Z])|[°º˚]|\bdegrees?\b)\s*"
        ),
        "°",
    ),
    (re.compile(r"°(?i:f|fahrenheit)\b"), "°F"),
    (re.compile(r"°(?i:c|celsius|centigrade)\b"), "°C"),
    (re.compile(r"\\(?:Omega|ohm)(?![a-zA-Z])"), " Ω"),
    (re.compile(r"\\(?:mu|micro)\s*(?=[a-zA-Z])|µ"), "μ"),
    (re.compile(r"(?<=[a-zA-ZμΩ\d])\s*(?:\\cdot|\\times|⋅)\s*(?=[a-zA-ZμΩ])"), "·"),
    (re.compile(r"\s*\^\s*\{\s*(-?\d)\s*\}"), r"^\1"),
    (re.compile(r"(?<=[a-zA-ZΩ])\s*\^\s*(?=-?\d)"), "^"),
    (re.compile(r"(?<=[a-zA-ZΩ])(?=[⁻⁰¹²³⁴])"), "^"),
]
"""How units may be written, and the plain form that is read."""
_NAME = r"(?:°[FC]?|[a-zA-ZΩμ]+|[$¢€£¥₹])(?:\^[-⁻]?[\d⁰¹²³⁴])?"
_VALUE = (
    r"(?:\\(?:pi|sqrt|[dt]?frac|times|cdot|ln|log|infty)(?![a-zA-Z])|e\^|[\d\s.,+\-−*/^(){}!:·×%])*[\d)}!%]"
    r"|(?:[\d\s.,+\-−*/(){}]|\\(?:[dt]?frac|sqrt|cdot|times)(?![a-zA-Z]))*\\pi"
)
_QUANTITY = re.compile(
    rf"(?P<value>{_VALUE})(?P<gap>\s*)(?P<unit>{_NAME}(?:(?:\s*[·*/]\s*|\s+){_NAME})*)"
)
_MONEY = re.compile(rf"[€£¥₹]?\s*(?P<value>{_VALUE})\s*[€£¥₹]?")
MAX_QUANTITY = 200
"""Characters of an answer in which a unit is looked for."""


class Quantity(Struct, frozen=True):
    """An answer split into a value and its unit, as powers of known units; `unit` is None where
    none is known.

    `variable`: the unit is one letter that follows the value at once and may as well be a variable,
    as in `5m`.
    """

    answer: str
    value: str
    unit: frozenset[tuple[str, int]] | None = None
    variable: bool = False


def quantity(content: str) -> Quantity:
    r"""Split an answer such as `5 km`, `5\text{ m/s}^2`, `\pi cm`, `20°F`, `\$5`; else all of it is
    the value."""
    answer = tidy(content)
    if len(answer) > MAX_QUANTITY:
        return Quantity(answer, answer)
    money, currency = _MONEY.fullmatch(answer), _currency(content)
    if money is not None and currency is not None:
        return Quantity(answer, money["value"].strip(), frozenset({(_UNIT_OF[currency], 1)}))
    match = _QUANTITY.fullmatch(_flat(answer))
    unit = None if match is None else _powers(match["unit"])
    if match is None or unit is None:
        return Quantity(answer, answer)
    letter = match["gap"] == "" and re.match(r"[a-zA-Z](?![a-zA-Z])", match["unit"]) is not None
    return Quantity(
        answer, match["value"].strip(), unit, variable=letter and unstyled(answer) == answer
    )


def _currency(content: str) -> str | None:
    r"""The sign of a currency in an answer: `\$5`, `$5`, `€5`; but in `$5$` the signs only enclose
    mathematics."""
    sign = re.search("[€£¥₹]", content)
    if sign is not None:
        return sign[0]
    return "$" if r"\$" in content or content.count("$") == 1 else None


def _flat(answer: str) -> str:
    r"""A tidy answer in plain signs: no `\text`, degrees as °, powers as ^2."""
    answer = unstyled(unstyled(answer))
    for pattern, replacement in _PLAIN:
        answer = pattern.sub(replacement, answer)
    return " ".join(answer.split())


def _powers(text: str) -> frozenset[tuple[str, int]] | None:
    """Unit -> power of a product or quotient of units; None if a part is not known."""
    powers: Counter[str] = Counter()
    sign, waiting = 1, 1
    last: str | None = None
    for token in re.findall(rf"{_NAME}|/", text):
        word, _, exponent = token.translate(_SUPERSCRIPTS).partition("^")
        if token == "/" or word == "per":
            sign = -1
        elif word.lower() in _POWER_WORDS and exponent == "":
            if word.lower().endswith("ed") and last is not None:
                powers[last] *= _POWER_WORDS[word.lower()]
            else:
                waiting = _POWER_WORDS[word.lower()]
        else:
            over, under = _COMPOUND.get(word.lower(), (word, None))
            unit = _UNIT_OF.get(over) or _UNIT_OF.get(over.lower())
            if unit is None:
                return None
            powers[unit] += sign * waiting * int(exponent or 1)
            if under is not None:
                powers[under] -= sign
            last, waiting = unit, 1
    return frozenset((unit, power) for unit, power in powers.items() if power) or None


def contradict(one: Quantity, other: Quantity) -> bool:
    """Whether both have a known unit, and not the same."""
    if one.unit is None or other.unit is None or one.unit == other.unit:
        return False
    names = {name for name, _ in one.unit ^ other.unit}
    return names not in _EITHER


def values(one: Quantity, other: Quantity) -> tuple[str, str]:
    """Both without their units; what may be a variable stays unless the other side has it as its
    unit too."""
    same = one.unit is not None and one.unit == other.unit
    first, second = (
        side.answer if side.variable and not same else side.value for side in (one, other)
    )
    return first, second
