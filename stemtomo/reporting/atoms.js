// Atoms in 3D on a plain canvas: orthographic, painted from back to front, turned with the mouse, the finger or the arrow keys.
document.querySelectorAll("canvas[data-atoms]").forEach((canvas) => {
  "use strict";
  const data = JSON.parse(document.getElementById(canvas.dataset.atoms).textContent);
  const controls = canvas.closest(".atoms");
  const pen = canvas.getContext("2d");
  const n = data.x.length;
  const middle = (v) => { let lo = Infinity, hi = -Infinity; for (const a of v) { if (a < lo) lo = a; if (a > hi) hi = a; } return (lo + hi) / 2; };
  const centre = [middle(data.x), middle(data.y), middle(data.z)];
  const points = new Float32Array(3 * n);
  let reach = 1;
  for (let i = 0; i < n; i++) {
    points[3 * i] = data.x[i] - centre[0]; points[3 * i + 1] = data.y[i] - centre[1]; points[3 * i + 2] = data.z[i] - centre[2];
    reach = Math.max(reach, Math.hypot(points[3 * i], points[3 * i + 1], points[3 * i + 2]));
  }
  const visible = data.species.map((kind) => kind.shown !== false);
  const order = new Uint32Array(n), depth = new Float32Array(n), screen = new Float32Array(2 * n);
  let zoom = 1, width = 0, height = 0, ratio = 1, pending = false;
  // Rows are the screen's right, down and away from the viewer in sample coordinates. The start looks along the beam, slightly turned.
  const views = { x: [[0, 0, 1], [0, 1, 0], [-1, 0, 0]], y: [[1, 0, 0], [0, 0, 1], [0, -1, 0]], z: [[1, 0, 0], [0, 1, 0], [0, 0, 1]] };
  let view = views.z.map((row) => row.slice());

  function turn(right, down) { // about the screen's vertical and horizontal axes
    const spin = (i, j, angle) => {
      const c = Math.cos(angle), s = Math.sin(angle), a = view[i], b = view[j];
      view[i] = a.map((v, k) => c * v - s * b[k]);
      view[j] = a.map((v, k) => s * v + c * b[k]);
    };
    spin(0, 2, right); spin(1, 2, down);
    draw();
  }

  const sprites = new Map();
  function sprite(colour, radius, shade) { // a lit ball; the farther, the fainter
    const size = Math.max(2, Math.round(radius)), key = colour + size + "/" + shade;
    if (sprites.size > 600) sprites.clear(); // zooming leaves many sizes behind
    if (!sprites.has(key)) {
      const ball = document.createElement("canvas");
      ball.width = ball.height = 2 * size + 2;
      const c = ball.getContext("2d"), m = size + 1;
      c.globalAlpha = 1;
      const light = c.createRadialGradient(m - size * 0.35, m - size * 0.4, size * 0.1, m, m, size);
      light.addColorStop(0, mix(colour, [255, 255, 255], 0.65));
      light.addColorStop(0.45, colour);
      light.addColorStop(1, mix(colour, [0, 0, 0], 0.45));
      c.fillStyle = light; c.beginPath(); c.arc(m, m, size, 0, 2 * Math.PI); c.fill();
      c.globalCompositeOperation = "source-atop"; c.fillStyle = background(); c.globalAlpha = 0.55 * shade / 8; c.fillRect(0, 0, 2 * m, 2 * m);
      sprites.set(key, ball);
    }
    return sprites.get(key);
  }
  function mix(colour, other, part) {
    const v = [1, 3, 5].map((k, i) => Math.round(parseInt(colour.slice(k, k + 2), 16) * (1 - part) + other[i] * part));
    return `rgb(${v.join(",")})`;
  }
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const background = () => style("--card");

  function draw() { if (!pending) { pending = true; requestAnimationFrame(paint); } }
  function paint() {
    pending = false;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const scale = zoom * 0.46 * Math.min(width, height) / (reach + data.radius);
    const [r, d, f] = view;
    let count = 0;
    for (let i = 0; i < n; i++) {
      if (!visible[data.kind[i]]) continue;
      const x = points[3 * i], y = points[3 * i + 1], z = points[3 * i + 2];
      screen[2 * i] = width / 2 + scale * (r[0] * x + r[1] * y + r[2] * z);
      screen[2 * i + 1] = height / 2 + scale * (d[0] * x + d[1] * y + d[2] * z);
      depth[i] = f[0] * x + f[1] * y + f[2] * z;
      order[count++] = i;
    }
    const sorted = order.subarray(0, count).sort((a, b) => depth[b] - depth[a]);
    for (const i of sorted) {
      const kind = data.species[data.kind[i]];
      const shade = Math.max(0, Math.min(8, Math.round(4 * (depth[i] / reach + 1))));
      const ball = sprite(kind.colour, scale * kind.radius * ratio, shade), side = ball.width / ratio;
      pen.drawImage(ball, screen[2 * i] - side / 2, screen[2 * i + 1] - side / 2, side, side);
    }
    scaleBar(scale); triad();
    document.documentElement.dataset.atoms = String(count); // says to a test, or to a person at the console, that it was drawn
  }
  function scaleBar(scale) {
    const wanted = 0.2 * width / scale, power = 10 ** Math.floor(Math.log10(wanted));
    const length = [1, 2, 5, 10].filter((s) => s * power <= wanted).pop() * power;
    pen.fillStyle = pen.strokeStyle = style("--ink"); pen.lineWidth = 2.5;
    pen.beginPath(); pen.moveTo(18, height - 18); pen.lineTo(18 + length * scale, height - 18); pen.stroke();
    pen.font = "13px system-ui, sans-serif"; pen.textAlign = "left"; pen.fillText(`${+length.toPrecision(3)} Å`, 18, height - 25);
  }
  function triad() {
    const x0 = width - 52, y0 = height - 50, long = 30;
    pen.lineWidth = 1.5; pen.font = "13px system-ui, sans-serif"; pen.textAlign = "center"; pen.textBaseline = "middle";
    ["x", "y", "z"].map((name, k) => ({ name, dx: view[0][k], dy: view[1][k], away: view[2][k] })).sort((a, b) => b.away - a.away).forEach((axis) => {
      pen.globalAlpha = axis.away > 0.2 ? 0.5 : 1;
      pen.strokeStyle = pen.fillStyle = style("--ink");
      pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x0 + long * axis.dx, y0 + long * axis.dy); pen.stroke();
      pen.fillText(axis.name, x0 + (long + 9) * axis.dx + (Math.hypot(axis.dx, axis.dy) < 0.2 ? -9 : 0), y0 + (long + 9) * axis.dy);
    });
    pen.globalAlpha = 1; pen.textBaseline = "alphabetic";
  }

  function fit() {
    ratio = window.devicePixelRatio || 1;
    width = canvas.clientWidth; height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    sprites.clear();
    paint();
  }
  let last = null;
  canvas.addEventListener("pointerdown", (event) => { last = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    turn((event.clientX - last[0]) * 0.008, (event.clientY - last[1]) * 0.008);
    last = [event.clientX, event.clientY];
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { last = null; });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom = Math.max(0.3, Math.min(20, zoom * Math.exp(-event.deltaY * 0.0012))); draw(); }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
    if (step) { event.preventDefault(); turn(...step); }
  });
  for (const button of controls.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => { view = views[button.dataset.view].map((row) => row.slice()); zoom = 1; draw(); });
  }
  for (const box of controls.querySelectorAll("[data-kind]")) {
    box.addEventListener("change", () => { visible[Number(box.dataset.kind)] = box.checked; draw(); });
  }
  window.addEventListener("resize", fit);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { sprites.clear(); draw(); });
  turn(0.5, 0.3);
  fit();
});
