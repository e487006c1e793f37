const figures = JSON.parse(document.getElementById('figures').textContent);
const INK = '#1b1f24';  // what charts.py calls the page's text colour
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const all = selector => document.querySelectorAll(selector);

// --- charts

function inked(value, ink) {
  if (value === INK) return ink;
  if (Array.isArray(value)) return value.map(item => inked(item, ink));
  if (value && typeof value === 'object')
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, inked(item, ink)]));
  return value;
}

function themed(figure, width) {
  const narrow = document.querySelector('main').clientWidth < 560;
  const {data, layout} = inked(figure, css('--ink'));
  const font = {color: css('--ink'), size: narrow ? 11 : 13}, box = {bgcolor: css('--card'), bordercolor: css('--line')};
  layout.paper_bgcolor = layout.plot_bgcolor = css('--paper');
  layout.font = {...font, family: 'system-ui, sans-serif'};
  layout.hoverlabel = {...box, font: {color: css('--ink')}, align: 'left'};
  layout.modebar = {bgcolor: 'rgba(0,0,0,0)', color: css('--soft'), activecolor: css('--ink')};
  for (const axis of ['xaxis', 'yaxis'])
    Object.assign(layout[axis], {gridcolor: css('--grid'), linecolor: css('--line'), tickcolor: css('--line')});
  for (const note of layout.annotations || []) note.bgcolor = css('--paper');
  for (const menu of layout.updatemenus || []) Object.assign(menu, box, {font});
  if (narrow) layout.margin.l = 8;
  if (document.documentElement.classList.contains('print')) layout.width = width;  // no time to wait for a resize
  return [data, layout];
}

function draw() {
  for (const place of all('.chart')) {
    const name = place.dataset.figure, [data, layout] = themed(figures[name], place.clientWidth);
    const small = place.closest('.many'), touched = window.matchMedia('(hover: none)').matches;
    Plotly.react(place, data, layout, {
      responsive: true, displaylogo: false, showTips: false, displayModeBar: small ? false : touched || 'hover',
      modeBarButtons: [['zoom2d', 'pan2d', 'resetScale2d', 'toImage']], toImageButtonOptions: {filename: name, scale: 2},
    });
  }
}

draw();
window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
window.addEventListener('beforeprint', () => {  // the print style is not in force yet: a class brings it now
  document.documentElement.classList.add('print');
  draw();
});
window.addEventListener('afterprint', () => {
  document.documentElement.classList.remove('print');
  draw();
});

// --- commands to copy

async function copied(button, text, source) {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = button.dataset.copied;
  } catch {
    if (source) getSelection().selectAllChildren(source);
    else window.prompt('Copy the command:', text);
    button.textContent = source ? 'Selected: press Ctrl-C' : said;
  }
  setTimeout(() => button.textContent = said, 2000);
}

for (const button of all('button[data-copy]')) {
  const source = document.getElementById(button.dataset.copy);
  button.addEventListener('click', () => copied(button, source.textContent, source));
}
for (const button of all('button[data-copy-text]'))
  button.addEventListener('click', () => copied(button, button.dataset.copyText));

// --- tables: sort, filter, CSV

const rowsOf = table => [...table.tBodies[0].rows];
const textOf = (row, column) => row.cells[column].textContent.trim();

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column], up = head.getAttribute('aria-sort') !== 'ascending';
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const known = text => text !== '' && text !== '-';
  rowsOf(table).sort((a, b) => {
    const [x, y] = [textOf(a, column), textOf(b, column)];
    if (!known(x) || !known(y)) return known(y) - known(x);  // what is not known comes last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  }).forEach(row => table.tBodies[0].append(row));
}

for (const table of all('table.sortable'))
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    if (cell.classList.contains('plain')) return;
    cell.tabIndex = 0;
    cell.addEventListener('click', () => sort(table, column));
    cell.addEventListener('keydown', event => { if (event.key === 'Enter') sort(table, column); });
  });

for (const input of all('input[data-filter]'))
  input.addEventListener('input', () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rowsOf(document.getElementById(input.dataset.filter)))
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });

for (const button of all('button[data-csv]'))
  button.addEventListener('click', () => {
    const table = document.getElementById(button.dataset.csv);
    const columns = [...table.tHead.rows[0].cells].flatMap((cell, n) => cell.classList.contains('plain') ? [] : [n]);
    const quoted = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const lines = [table.tHead.rows[0], ...rowsOf(table)].map(row => columns.map(n => quoted(textOf(row, n))).join(','));
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([lines.join('\r\n') + '\r\n'], {type: 'text/csv'}));
    link.download = button.dataset.file;
    link.click();
  });

// --- explanations of terms

const tip = document.createElement('div');
tip.id = 'tip';
tip.setAttribute('role', 'tooltip');
function explain(word) {
  const place = word.getBoundingClientRect();
  tip.textContent = word.dataset.tip;
  document.body.append(tip);
  const below = place.bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8)) + 'px';
  tip.style.top = (below ? place.bottom + 6 : place.top - tip.offsetHeight - 6) + 'px';
}
for (const word of all('[data-tip]')) {
  for (const event of ['mouseenter', 'focus', 'click']) word.addEventListener(event, () => explain(word));
  for (const event of ['mouseleave', 'blur']) word.addEventListener(event, () => tip.remove());
}
window.addEventListener('scroll', () => tip.remove(), true);
