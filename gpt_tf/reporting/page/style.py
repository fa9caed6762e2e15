"""The page's style: light and dark, phone and desktop, and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f5f7f9; --ink: #1f2933; --soft: #52606d;
  --line: #d9e0e6; --link: #00558a; --accent: #a33c00; --good: #00664a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --card: #1e242b; --ink: #e6eaee; --soft: #a8b3bd;
    --line: #343d47; --link: #7cc4f0; --accent: #ff9a5c; --good: #4fd1a5;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.25rem 3rem;
  background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 {
  font-size: clamp(1.5rem, 6vw, 2.4rem); line-height: 1.15; margin: 0 0 .4rem;
  overflow-wrap: anywhere;
}
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p, ul { max-width: 44rem; }
a { color: var(--link); }
a.term {
  color: inherit; text-decoration: underline dotted; text-underline-offset: .2em;
}
.eyebrow { color: var(--accent); font-weight: 600; margin: 0 0 .25rem; }
.what, figcaption, footer, small, caption { color: var(--soft); }
.miss, .warn { border-left: 4px solid var(--accent); padding-left: .75rem; }
nav ul {
  list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; max-width: none;
  margin: 1rem 0 0; padding: 0; font-size: .9rem;
}
nav li { padding: .2rem 0; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
  gap: .75rem; margin: 1.25rem 0;
}
.figures > div {
  background: var(--card); border-radius: .6rem; padding: .8rem 1rem;
}
.figures dt { font-size: .9rem; color: var(--soft); }
.figures dd { margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
.figures .big {
  font-size: 1.6rem; font-weight: 650; line-height: 1.25; white-space: nowrap;
}
.better, .cost { font-weight: 600; }
.better { color: var(--good); }
figure { margin: 1.25rem 0; }
figcaption { font-size: .9rem; margin-top: .4rem; max-width: 44rem; }
img {
  display: block; width: 100%; max-width: 35rem; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .5rem; padding: .4rem;
}
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; margin: 0; overflow-x: auto; font-size: .875rem;
}
pre.sample { max-height: 22rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
td code { font-size: .85em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td {
  padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top;
}
thead th { font-size: .82rem; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8.5rem; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
td small { display: block; white-space: nowrap; font-size: .8em; }
.tag {
  border: 1px solid currentColor; border-radius: 1rem; padding: 0 .5rem;
  font-size: .75rem; font-weight: 600; white-space: nowrap; color: var(--soft);
}
.tag.good, .met { color: var(--good); }
.unmet { color: var(--accent); }
.met, .unmet { font-weight: 600; white-space: nowrap; }
details { margin: .75rem 0; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; color: var(--link); }
.facts { display: grid; gap: .3rem; margin: .5rem 0; }
.facts > div { display: grid; grid-template-columns: 11rem 1fr; gap: .75rem; }
.facts dt { color: var(--soft); }
.facts dd, .terms dd { margin: 0; overflow-wrap: anywhere; }
.terms { max-width: 44rem; }
.terms > div { margin: 0 0 .9rem; }
.terms dt { font-weight: 650; }
.terms dt:target { color: var(--accent); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: .85rem; }
footer p { margin: .5rem 0; }
@media (min-width: 60rem) {
  figure.picture {
    display: grid; grid-template-columns: 35rem minmax(0, 1fr); gap: 1.5rem;
    align-items: start;
  }
  .picture figcaption { margin: .5rem 0 0; position: sticky; top: 1rem; }
}
@media (max-width: 44rem) {
  body { padding: 1rem 1rem 2rem; }
  .figures { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
  .figures .big { font-size: 1.3rem; }
  .facts > div { grid-template-columns: 1fr; gap: 0; }
  table.cards thead {
    position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%);
  }
  table.cards, .cards tbody, .cards caption { display: block; }
  .cards tr {
    display: grid; grid-template-columns: 1fr 1fr; gap: .5rem .9rem;
    background: var(--card); border-radius: .6rem; padding: .75rem .9rem;
    margin-bottom: .75rem;
  }
  .cards th, .cards td { display: block; padding: 0; border: 0; text-align: left; }
  .cards tbody th { grid-column: 1 / -1; font-size: 1rem; }
  .cards td.text { grid-column: 1 / -1; }
  .cards td::before {
    content: attr(data-label); display: block; color: var(--soft); font-size: .78rem;
  }
  .cards td small { white-space: normal; }
}
@media print {
  :root {
    color-scheme: light; --paper: #fff; --card: #f5f7f9; --ink: #000; --soft: #444;
    --line: #bbb; --link: #000; --accent: #a33c00; --good: #00664a;
  }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  thead th { font-size: 6.5pt; }
  .tag { font-size: 6pt; }
  th, td { padding: .2rem .3rem; }
  tbody th { min-width: 4.5rem; }
  td small { white-space: normal; }
  h2 { break-after: avoid; }
  tr, .figures > div { break-inside: avoid; }
  img { max-width: 28rem; max-height: 24cm; width: auto; }
  pre { white-space: pre-wrap; }
  pre.sample { max-height: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
