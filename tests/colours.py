"""How well one colour is seen on another."""


def contrast(a: str, b: str) -> float:
  """The contrast of two colours such as '#1f2328': 1 to 21 (WCAG 2, relative luminance)."""
  darker, lighter = sorted(map(_luminance, (a, b)))
  return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
  linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
