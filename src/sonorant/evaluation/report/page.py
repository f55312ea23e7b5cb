"""The frame of a page, its style, and how text comes into it."""

from __future__ import annotations

import html
from collections.abc import Sequence


def make_page(title: str, notes: Sequence[str], sections: Sequence[tuple[str, str]]) -> str:
    """The whole page: notes are text, sections are (title, HTML); those without content are left out."""
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{told}{body}</main></body></html>\n"
    )


def in_scroller(image: str, caption: str) -> str:
    """An image too wide for a phone, in a frame that scrolls sideways."""
    return f'<figure><div class="wide drawing">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def escape(value: object) -> str:
    """The value as text that HTML takes for nothing else."""
    return html.escape(str(value))


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #fff; color: #1f2328;
  font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 1.15rem; margin: 40px 0 12px; padding-top: 12px; border-top: 1px solid #d8dee4; }
.note { margin: 0 0 8px; padding: 8px 12px; background: #f3f6f9; border-left: 3px solid #2563a8; }
.small, figcaption, .others, .what, dd { color: #57606a; font-size: .875rem; }
td small { color: #57606a; font-size: .75rem; font-weight: 400; white-space: nowrap; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin-bottom: 20px;
}
.tile { border: 1px solid #d8dee4; border-radius: 6px; padding: 12px 14px; }
.value { font-size: 1.75rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid #eef1f4; font-weight: 400; }
thead th { font-weight: 600; vertical-align: bottom; }
.scores { width: 100%; }
.scores td, .scores thead th { text-align: right; padding: 5px 0 5px 14px; white-space: nowrap; }
.scores th[scope=row] { min-width: 9.5rem; }
.arms thead th { white-space: normal; min-width: 6rem; }
.group th { padding-top: 16px; font-weight: 600; }
.wide + .wide { margin-top: 28px; }
.claims { width: 100%; }
.claims td { white-space: nowrap; }
.claims tbody th { min-width: 7.5rem; }
.verdicts td { padding-left: 12px; }
.verdicts a { color: #1f4f8a; }
.word { padding: 2px 9px; border-radius: 10px; background: #f3f6f9; color: #57606a; white-space: nowrap; }
.word.supports { background: #e3f3e7; color: #17602b; font-weight: 600; }
.word.contradicts { background: #fde9e7; color: #9a1f17; font-weight: 600; }
.best { font-weight: 700; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px;
}
.panels img { width: 100%; max-width: 480px; height: auto; }
.drawing img { width: 100%; min-width: 800px; height: auto; display: block; }
figure { margin: 0 0 20px; }
.search ol { display: flex; flex-wrap: wrap; gap: 10px; margin: 6px 0 0; padding: 0; list-style: none; }
.search li { width: 104px; padding: 3px; border: 1px solid #d8dee4; border-radius: 6px; text-align: center; }
.search li div { line-height: 1.35; }
.search .right { border: 3px solid #2563a8; padding: 1px; }
.search .same { border: 2px dashed #2563a8; padding: 2px; }
.search .gap { width: auto; border: 0; align-self: center; }
.search li img, .unseen { width: 96px; height: 96px; max-width: 100%; }
.search li img { object-fit: contain; background: #f3f6f9; display: block; margin: auto; }
.unseen { margin: auto; overflow: hidden; overflow-wrap: anywhere; font-size: .7rem; color: #57606a; }
.mark { font-size: .875rem; color: #57606a; }
.right .mark, .same .mark { color: #1f4f8a; font-weight: 600; }
.wave img { width: 100%; max-width: 300px; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; font-size: .875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f6f8fa; padding: 12px; font-size: .8rem; }
summary { cursor: pointer; }
@media (max-width: 560px) {
  main { padding: 16px 14px 48px; }
  h1 { font-size: 1.35rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 8px 10px; }
  .value { font-size: 1.4rem; }
  .search .gap { display: none; }
  table { font-size: .8rem; }
  .scores td, .scores thead th { padding-left: 8px; }
  .scores th[scope=row] { min-width: 7.5rem; padding-right: 0; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; }
}
"""
