"""Units that contradict each other: 5 m is not 5 km, although both are the number 5.

The comparison of mathematics drops units, so that `5 cm` answers a gold `5`. Two answers that both
name a unit from this table must name the same one. Nothing is converted, and a unit that the table
does not know contradicts nothing.
"""

from __future__ import annotations

import re

_NAMES = """
mm millimeter millimeters millimetre millimetres | cm centimeter centimeters centimetre centimetres
m meter meters metre metres | km kilometer kilometers kilometre kilometres | in inch inches | ft foot feet
yd yard yards | mi mile miles | mg milligram milligrams | g gram grams | kg kilogram kilograms | lb lbs pound pounds
oz ounce ounces | ton tons tonne tonnes | ms millisecond milliseconds | s sec second seconds | min minute minutes
h hr hour hours | day days | week weeks | month months | year years | ml milliliter milliliters millilitre millilitres
l liter liters litre litres | gal gallon gallons | dollar dollars | cent cents
j joule joules | kj kilojoule kilojoules | n newton newtons | w watt watts | kw kilowatt kilowatts
v volt volts | a ampere amperes | hz hertz
"""
_UNIT_OF = {
    name: unit[0]
    for line in _NAMES.strip().splitlines()
    for unit in (entry.split() for entry in line.split("|"))
    for name in unit
}
_LAST = re.compile(r"[\d}]\s*(?:\\(?:text|mathrm|mbox|rm)\s*\{\s*)?([A-Za-z]+)\s*\}?")


def unit_of(answer: str) -> str | None:
    """The unit at the end of an answer such as `5 km` or `5\\text{ kilometres}`, by its short name,
    if it is known."""
    tail = answer[-40:]
    matches = [match for match in _LAST.finditer(tail) if match.end() == len(tail)]
    return _UNIT_OF.get(matches[-1].group(1).lower()) if matches else None


def contradict(answer: str, gold: str) -> bool:
    """Whether both name a known unit, and not the same."""
    one, other = unit_of(answer), unit_of(gold)
    return one is not None and other is not None and one != other
