// Runs in the page once it is laid out, and writes what it measures into an attribute of the root element.
(() => {
  const root = document.documentElement;
  const wide = innerWidth;
  const own = e => e.closest('.scroll') === null || e.classList.contains('scroll');
  const name = e => e.tagName + '.' + (e.getAttribute('class') || '') + ' ' + e.textContent.trim().slice(0, 40);
  const over = [...document.querySelectorAll('body *')]
    .filter(e => own(e) && !e.closest('svg') && e.getBoundingClientRect().right > wide + 1).map(name);
  // Letters that stick out of their chart are cut off; small ones cannot be read.
  const cut = [], small = [];
  let charts = 0, drawn = 0;
  for (const svg of document.querySelectorAll('svg.chart')) {
    charts++;
    const box = svg.getBoundingClientRect();
    if (box.width > 100 && box.height > 50 && svg.querySelector('.f0,.f1,.f2,.f3,.f4,.f5,.f6,.f7,.s0,.s1,.s2')) drawn++;
    for (const text of svg.querySelectorAll('text')) {
      const at = text.getBoundingClientRect();
      if (at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1)
        cut.push(text.textContent.trim());
      const px = parseFloat(getComputedStyle(text).fontSize) * box.width / svg.viewBox.baseVal.width;
      if (px < 7.5) small.push(px.toFixed(1) + ' ' + text.textContent.trim());
    }
  }
  const links = [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.getElementById(a.getAttribute('href').slice(1)));
  const images = [...document.images];
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  root.setAttribute('data-probe', JSON.stringify({
    wide, scroll_width: root.scrollWidth, height: root.scrollHeight,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    ground: getComputedStyle(document.body).backgroundColor,
    charts, drawn, over: over.slice(0, 5), cut: cut.slice(0, 5), small: small.slice(0, 5),
    dead_links: links.map(name), images: images.length,
    broken_images: images.filter(i => !i.complete || i.naturalWidth === 0).length,
    doubled_ids: ids.filter((id, n) => ids.indexOf(id) !== n),
    unnamed: [...document.querySelectorAll('img:not([alt]),svg.chart:not([role=img])')].length,
  }));
})();
