// Draws explorer.html from its JSON; asks nobody for anything. Codes: see patch_attention.py.
(function () {
  "use strict";
  const byId = (id) => document.getElementById("sta-" + id);
  const data = JSON.parse(byId("data").textContent);
  const T = data.frames, H = data.heads, HIDDEN = 255, EVEN = 127, base = Math.max(2, T);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const means = bytes(data.means), patches = data.patches;
  const codes = patches && bytes(patches.codes);
  const table = Float32Array.from({ length: 256 }, (_, c) => (c === HIDDEN ? NaN : Math.pow(base, (c - EVEN) / EVEN)));
  const R = patches ? patches.rows : 0, C = patches ? patches.columns : 0;
  const state = { block: data.first, head: -1, frame: 0, row: R >> 1, column: C >> 1, all: !patches, under: null };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const sprite = data.sprite && new Image(), grey = data.sprite && new Image();  // grey below the map's colours

  // ---- numbers: multiples of even spread, NaN where a frame may not look
  const slot = () => (patches ? patches.blocks.indexOf(state.block) : -1);
  const heads = (count) => (state.head < 0 || count === 1 ? Array.from({ length: count }, (_, h) => h) : [state.head]);
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const whole = (q, k) => mean(heads(H).map((h) => table[means[((state.block * H + h) * T + q) * T + k]]));
  function ofPatch(row, column, q, k) {
    const s = slot();
    return mean(heads(patches.heads).map((h) => table[codes[((((s * patches.heads + h) * R + row) * C + column) * T + q) * T + k]]));
  }
  const single = () => !state.all && slot() >= 0;
  const chosen = (q, k) => (single() ? ofPatch(state.row, state.column, q, k) : whole(q, k));
  const seen = (q) => strip.filter((_, k) => !Number.isNaN(whole(q, k))).length;

  // ---- words
  const time = (frame) => (data.times ? data.times[frame].toFixed(2) + " s" : "");
  const name = (frame) => "frame " + frame + (data.times ? " (" + time(frame) + ")" : "");
  const times = (value) => (Number.isNaN(value) ? "not seen" : value.toFixed(value < 9.95 ? 2 : 1) + "×");
  const where = () => (single() ? "Row " + state.row + ", column " + state.column : "The mean of all patches");
  function describe() {
    let most = -1, least = -1;
    for (let k = 0; k < T; k++) {
      const value = chosen(state.frame, k);
      if (Number.isNaN(value)) continue;
      if (most < 0 || value > chosen(state.frame, most)) most = k;
      if (least < 0 || value < chosen(state.frame, least)) least = k;
    }
    return where() + " of " + name(state.frame) + ", block " + data.blocks[state.block] +
      (state.head < 0 ? ", mean of the heads" : ", head " + state.head) + ": looks most at " + name(most) + " (" +
      times(chosen(state.frame, most)) + " uniform), least at " + name(least) + " (" + times(chosen(state.frame, least)) + ").";
  }

  // ---- colours
  function palette() {
    const style = getComputedStyle(byId("strip"));
    const read = (key) => style.getPropertyValue(key).trim().match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16));
    return { less: read("--less"), even: read("--even"), more: read("--more"), text: style.color };
  }
  let colours = null;
  function colour(value) {
    const place = Math.max(-1, Math.min(1, Math.log(Math.max(value, 1e-6)) / Math.log(data.scale)));
    const end = place < 0 ? colours.less : colours.more, part = Math.abs(place);
    return "rgb(" + colours.even.map((c, i) => Math.round(c + (end[i] - c) * part)).join(",") + ")";
  }

  // ---- drawing
  function fit(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.aspectRatio = width + " / " + height;
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }
  function picture(context, frame, width, height, image) {
    const w = data.sprite.width, h = data.sprite.height, across = data.sprite.across;
    context.imageSmoothingEnabled = width < 2 * w;
    context.drawImage(image, (frame % across) * w, Math.floor(frame / across) * h, w, h, 0, 0, width, height);
  }
  const edges = (row, column) => {  // the last cells may hold fewer patches than the others
    const [rows, columns] = patches.whole, e = patches.edge;
    return [column * e / columns, row * e / rows, Math.min(1, (column + 1) * e / columns), Math.min(1, (row + 1) * e / rows)];
  };
  function mark(context, row, column, width, height, kind) {
    const [left, top, right, bottom] = edges(row, column);
    for (const [line, shade] of width < 100 ? [[2, "#000"], [1, kind]] : [[4, "#000"], [2, kind]]) {
      context.lineWidth = line;
      context.strokeStyle = shade;
      context.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
    }
  }
  function overlay(context, k, width, height) {
    for (let row = 0; row < R; row++) for (let column = 0; column < C; column++) {
      const value = ofPatch(row, column, state.frame, k), [left, top, right, bottom] = edges(row, column);
      if (Number.isNaN(value)) continue;
      context.globalAlpha = 0.45 + 0.4 * Math.min(1, Math.abs(Math.log(Math.max(value, 1e-6)) / Math.log(data.scale)));
      context.fillStyle = colour(value);
      context.fillRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
    }
    context.globalAlpha = 1;
  }
  function size(canvas) {
    const width = canvas.clientWidth || 60;
    return [width, data.sprite ? width * data.sprite.height / data.sprite.width : width * 0.4];
  }
  function drawPicture() {
    byId("picture-box").hidden = !data.sprite;
    if (!data.sprite) return;
    const canvas = byId("picture"), [width, height] = size(canvas), context = fit(canvas, width, height);
    picture(context, state.frame, width, height, sprite);
    if (state.under) mark(context, state.under.row, state.under.column, width, height, "#9da7b1");
    if (single()) mark(context, state.row, state.column, width, height, "#fff");
  }
  function drawStrip() {
    strip.forEach(({ button, canvas, number }, k) => {
      const value = chosen(state.frame, k), [width, height] = size(canvas), context = fit(canvas, width, height);
      if (data.sprite) {
        context.globalAlpha = 0.5;
        picture(context, k, width, height, grey);
        context.globalAlpha = 1;
      }
      if (slot() >= 0 && data.sprite) overlay(context, k, width, height);
      else if (!Number.isNaN(value)) {
        context.fillStyle = colour(value);
        if (data.sprite) context.globalAlpha = 0.72;
        context.fillRect(0, 0, width, height);
        context.globalAlpha = 1;
      }
      if (data.sprite && state.under) mark(context, state.under.row, state.under.column, width, height, "#9da7b1");
      if (data.sprite && single()) mark(context, state.row, state.column, width, height, "#fff");
      number.textContent = times(value);
      button.setAttribute("aria-pressed", String(k === state.frame));
      button.setAttribute("aria-label", name(k) + ": " + times(value) + " uniform" + (k === state.frame ? ", the frame that looks" : ""));
    });
  }
  const ticks = (function () {
    const step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128].find((s) => T / s <= 8) || Math.ceil(T / 8);
    return Array.from({ length: Math.ceil(T / step) }, (_, i) => i * step);
  })();
  const margin = 26;
  function drawMatrix() {
    const canvas = byId("matrix"), width = canvas.clientWidth || 260, cell = (width - margin) / T;
    const context = fit(canvas, width, width);
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = colours.text;
    context.textBaseline = "middle";
    for (const tick of ticks) {
      const place = margin + (tick + 0.5) * cell;
      context.textAlign = "center";
      context.fillText(String(tick), place, margin / 2);
      context.textAlign = "right";
      context.fillText(String(tick), margin - 5, place);
    }
    for (let q = 0; q < T; q++) for (let k = 0; k < T; k++) {
      const value = chosen(q, k);
      if (Number.isNaN(value)) continue;
      context.fillStyle = colour(value);
      context.fillRect(margin + k * cell, margin + q * cell, cell + 0.3, cell + 0.3);
    }
    context.lineWidth = 2;
    context.strokeStyle = colours.text;
    context.strokeRect(margin + 1, margin + state.frame * cell, width - margin - 2, Math.max(cell, 2));
  }
  function drawScale() {
    const canvas = byId("scale"), width = canvas.clientWidth || 300, context = fit(canvas, width, 34);
    for (let x = 0; x < width; x++) {
      context.fillStyle = colour(Math.pow(data.scale, 2 * x / (width - 1) - 1));
      context.fillRect(x, 0, 1.5, 14);
    }
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colours.text;
    const words = [["left", 0, "1/" + data.scale + "× or less"], ["center", width / 2, "uniform"], ["right", width, data.scale + "× or more"]];
    for (const [align, place, word] of words) {
      context.textAlign = align;
      context.fillText(word, place, 29);
    }
  }
  function drawRows() {
    const count = seen(state.frame), rows = byId("rows");
    rows.replaceChildren();
    for (let k = 0; k < T; k++) {
      const value = chosen(state.frame, k), row = document.createElement("tr");
      const cells = [name(k), times(value), Number.isNaN(value) ? "0.0" : (100 * value / count).toFixed(1)];
      cells.forEach((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.textContent = text;
        row.append(cell);
      });
      rows.append(row);
    }
  }
  function draw() {
    colours = palette();
    const s = slot();
    byId("all-box").hidden = s < 0;
    byId("picture-title").textContent = "Frame that looks: " + name(state.frame);
    byId("frame").value = state.frame;
    byId("frame").setAttribute("aria-valuetext", name(state.frame));
    byId("frame-name").textContent = name(state.frame);
    byId("told").textContent = describe();
    drawPicture();
    drawMatrix();
    drawScale();
    drawStrip();
    drawRows();
  }

  // ---- pointer and keys
  function patchAt(canvas, event) {
    if (!patches || slot() < 0) return null;
    const box = canvas.getBoundingClientRect(), [rows, columns] = patches.whole;
    const x = Math.min(0.9999, Math.max(0, (event.clientX - box.left) / box.width));
    const y = Math.min(0.9999, Math.max(0, (event.clientY - box.top) / box.height));
    return { row: Math.floor(y * rows / patches.edge), column: Math.floor(x * columns / patches.edge) };
  }
  function point(canvas, frame) {
    canvas.addEventListener("pointermove", (event) => {
      const place = patchAt(canvas, event);
      if (!place) return;
      const moved = !state.under || state.under.row !== place.row || state.under.column !== place.column;
      state.under = place;
      byId("under").textContent = "Under the pointer: row " + place.row + ", column " + place.column + " of " + name(state.frame) + " looks at " +
        name(frame()) + " " + times(ofPatch(place.row, place.column, state.frame, frame())) + " uniform.";
      if (moved) { drawPicture(); drawStrip(); }
    });
    canvas.addEventListener("pointerleave", () => {
      state.under = null;
      byId("under").textContent = "\u00a0";
      drawPicture();
      drawStrip();
    });
    canvas.addEventListener("click", (event) => {
      const place = patchAt(canvas, event);
      state.frame = frame();
      if (place) Object.assign(state, place, { all: false });
      byId("all").checked = state.all;
      draw();
      event.stopPropagation();
    });
  }
  function keys(canvas, moves) {
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      moves(move[0], move[1]);
      draw();
    });
  }
  const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));

  function start() {  // at what is least even
    let farthest = -1;
    if (slot() < 0) return;
    for (let row = 0; row < R; row++) for (let column = 0; column < C; column++) for (let q = 0; q < T; q++) for (let k = 0; k < T; k++) {
      const away = Math.abs(Math.log(ofPatch(row, column, q, k)));
      if (away > farthest) { farthest = away; Object.assign(state, { row, column, frame: q }); }
    }
  }

  // ---- making the page
  const strip = Array.from({ length: T }, (_, k) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    const label = document.createElement("span"), number = document.createElement("b");
    button.type = "button";
    label.textContent = data.times ? k + " · " + time(k) : name(k);
    button.append(canvas, label, number);
    button.addEventListener("click", () => { state.frame = k; draw(); });
    byId("strip").append(button);
    point(canvas, () => k);
    return { button, canvas, number };
  });
  byId("strip").className = T <= 8 ? "few" : T <= 20 ? "some" : "many";
  const option = (value, text) => new Option(text, value);
  data.blocks.forEach((block, i) => byId("block").add(option(i, block + (patches && !patches.blocks.includes(i) ? " (no patches)" : ""))));
  byId("head").add(option(-1, "mean"));
  for (let h = 0; h < H; h++) byId("head").add(option(h, h));
  byId("block").value = state.block;
  byId("block").addEventListener("change", (event) => { state.block = Number(event.target.value); draw(); });
  byId("head").addEventListener("change", (event) => { state.head = Number(event.target.value); draw(); });
  byId("frame").addEventListener("input", (event) => { state.frame = Number(event.target.value); draw(); });
  byId("all").addEventListener("change", (event) => { state.all = event.target.checked; draw(); });
  point(byId("picture"), () => state.frame);
  keys(byId("picture"), (down, right) => {
    if (slot() < 0) return;
    state.all = byId("all").checked = false;
    state.row = clamp(state.row + down, R);
    state.column = clamp(state.column + right, C);
  });
  keys(byId("matrix"), (down) => { state.frame = clamp(state.frame + down, T); });
  byId("matrix").addEventListener("click", (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    state.frame = clamp(Math.floor((event.clientY - box.top - margin) / (box.height - margin) * T), T);
    draw();
  });
  document.getElementById("explore").hidden = false;
  start();
  dark.addEventListener("change", draw);
  window.addEventListener("resize", draw);
  if (sprite) {
    sprite.src = data.sprite.source;
    grey.src = data.sprite.grey;
    Promise.all([sprite.decode(), grey.decode()]).then(draw);
  } else draw();
})();
