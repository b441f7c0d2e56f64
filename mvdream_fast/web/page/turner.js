// A GLB on a canvas, to turn: by dragging, by keys, by calls. Plain WebGL 2, no library.
// It draws what mvdream_fast writes: one mesh, vertex colours or one texture, no node transforms, Y up, front at +Z.

const VERTEX = `#version 300 es
uniform mat4 camera; in vec3 position; in vec3 normal; in vec3 color; in vec2 uv;
out vec3 n; out vec3 c; out vec2 at;
void main() { gl_Position = camera * vec4(position, 1.0); n = normal; c = color; at = uv; }`;
const FRAGMENT = `#version 300 es
precision highp float;
uniform vec3 eye; uniform sampler2D image; uniform bool textured; in vec3 n; in vec3 c; in vec2 at; out vec4 drawn;
void main() {
  vec3 linear = textured ? texture(image, at).rgb : c;
  float facing = dot(n, n) > 0.0 ? abs(dot(normalize(n), eye)) : 1.0;
  linear *= 0.8 + 0.2 * facing;
  vec3 low = 12.92 * linear, high = 1.055 * pow(max(linear, 0.0), vec3(1.0 / 2.4)) - 0.055;
  drawn = vec4(mix(low, high, step(0.0031308, linear)), 1.0);
}`;
const FOVY = 40 * Math.PI / 180, ELEVATION = 15 * Math.PI / 180, AZIMUTH = -30 * Math.PI / 180;
const STEP = 15 * Math.PI / 180, SPIN = Math.PI / 4;  // radians a key press and a second
const ARRAYS = {5121: Uint8Array, 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array};
const WIDTHS = {SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4};

// The JSON and the binary part of a GLB file.
export function parse(buffer) {
  const head = new DataView(buffer);
  if (buffer.byteLength < 20 || head.getUint32(0, true) !== 0x46546c67) throw new Error("this is no GLB file");
  const length = head.getUint32(12, true), start = 20 + length + 8;
  const json = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  return {json, bytes: buffer.slice(start, start + head.getUint32(20 + length, true))};
}

function accessor({json, bytes}, index) {
  const of = json.accessors[index], view = json.bufferViews[of.bufferView];
  const start = (view.byteOffset || 0) + (of.byteOffset || 0);
  return {of, array: new ARRAYS[of.componentType](bytes, start, of.count * WIDTHS[of.type])};
}

export class Turner {
  // The context is asked for at once: null where the browser has none, and `works` says so.
  constructor(canvas, onTurn = () => {}) {
    this.canvas = canvas;
    this.onTurn = onTurn;
    this.gl = canvas.getContext("webgl2", {antialias: true, preserveDrawingBuffer: true});
    this.works = Boolean(this.gl);
    this.reset();
    if (!this.works) return;
    this.program = this.compile();
    this.listen();
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  reset() {
    Object.assign(this, {azimuth: AZIMUTH, elevation: ELEVATION, zoom: 1});
  }

  compile() {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    return program;
  }

  // Shows a GLB file's content; the view stays as it is turned.
  async show(buffer) {
    const file = parse(buffer), gl = this.gl, primitive = file.json.meshes[0].primitives[0];
    const named = primitive.attributes;
    const texture = file.json.images ? await this.texture(file) : null;
    this.clear();
    this.array = gl.createVertexArray();
    gl.bindVertexArray(this.array);
    this.buffers = [["position", "POSITION"], ["normal", "NORMAL"], ["color", "COLOR_0"], ["uv", "TEXCOORD_0"]].map(
      ([name, key]) => this.attribute(name, key in named ? accessor(file, named[key]) : null));
    const indices = accessor(file, primitive.indices);
    const elements = gl.createBuffer();
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, elements);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices.array, gl.STATIC_DRAW);
    this.buffers.push(elements);
    gl.bindVertexArray(null);
    this.mesh = {count: indices.of.count, type: indices.of.componentType, texture};
    this.frame(accessor(file, named.POSITION).array);
    this.draw();
  }

  attribute(name, found) {
    const gl = this.gl, at = gl.getAttribLocation(this.program, name);
    if (at < 0) return null;
    if (!found) {
      gl.vertexAttrib4f(at, ...(name === "color" ? [1, 1, 1, 1] : [0, 0, 0, 0]));
      return null;
    }
    const buffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, found.array, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, WIDTHS[found.of.type], found.of.componentType, Boolean(found.of.normalized), 0, 0);
    return buffer;
  }

  async texture(file) {
    const gl = this.gl, image = file.json.images[0], view = file.json.bufferViews[image.bufferView];
    const bytes = new Uint8Array(file.bytes, view.byteOffset || 0, view.byteLength);
    const bitmap = await createImageBitmap(new Blob([bytes], {type: image.mimeType}), {colorSpaceConversion: "none"});
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.SRGB8_ALPHA8, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
    gl.generateMipmap(gl.TEXTURE_2D);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
    bitmap.close();
    return texture;
  }

  clear() {
    this.spin(false);
    if (!this.mesh) return;
    this.buffers.forEach((buffer) => this.gl.deleteBuffer(buffer));
    this.gl.deleteVertexArray(this.array);
    this.gl.deleteTexture(this.mesh.texture);
    this.mesh = null;
    this.draw();
  }

  // Where the camera looks, and how far away all of the mesh stays in view while it is turned.
  frame(positions) {
    const low = [Infinity, Infinity, Infinity], high = low.map((x) => -x);
    for (let i = 0; i < positions.length; i++) {
      low[i % 3] = Math.min(low[i % 3], positions[i]);
      high[i % 3] = Math.max(high[i % 3], positions[i]);
    }
    this.center = low.map((x, i) => (x + high[i]) / 2);
    this.radius = Math.max(1e-6, Math.hypot(...low.map((x, i) => high[i] - x)) / 2);
  }

  draw() {
    const gl = this.gl, canvas = this.canvas, dense = Math.min(devicePixelRatio || 1, 2);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * dense));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * dense));
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(128 / 255, 128 / 255, 128 / 255, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!this.mesh) return;
    const {matrix, eye} = this.camera(canvas.width / canvas.height);
    gl.enable(gl.DEPTH_TEST);
    gl.useProgram(this.program);
    gl.uniformMatrix4fv(gl.getUniformLocation(this.program, "camera"), false, matrix);
    gl.uniform3fv(gl.getUniformLocation(this.program, "eye"), eye);
    gl.uniform1i(gl.getUniformLocation(this.program, "textured"), this.mesh.texture ? 1 : 0);
    gl.bindTexture(gl.TEXTURE_2D, this.mesh.texture);
    gl.bindVertexArray(this.array);
    gl.drawElements(gl.TRIANGLES, this.mesh.count, this.mesh.type, 0);
    gl.bindVertexArray(null);
  }

  // World to clip, by columns, and the direction from the mesh to the eye.
  camera(aspect) {
    const [sa, ca] = [Math.sin(this.azimuth), Math.cos(this.azimuth)];
    const [se, ce] = [Math.sin(this.elevation), Math.cos(this.elevation)];
    const eye = [sa * ce, se, ca * ce], right = [ca, 0, -sa], up = [-sa * se, ce, -ca * se];
    const away = 1.05 * this.radius / Math.sin(FOVY / 2) / Math.min(1, aspect) / this.zoom;
    const near = Math.max(away - 1.01 * this.radius, 0.01 * this.radius), far = away + 1.01 * this.radius;
    const f = 1 / Math.tan(FOVY / 2), a = -(far + near) / (far - near), b = -2 * far * near / (far - near);
    const rows = [right, up, eye], moved = rows.map((row) => -row.reduce((sum, x, i) => sum + x * this.center[i], 0));
    moved[2] -= away;
    const matrix = [];
    for (let j = 0; j < 3; j++) matrix.push(f / aspect * right[j], f * up[j], a * eye[j], -eye[j]);
    matrix.push(f / aspect * moved[0], f * moved[1], a * moved[2] + b, -moved[2]);
    return {matrix, eye};
  }

  // One step: "left", "right", "up", "down", "in", "out", "home" or "spin".
  turn(way) {
    const turns = {left: [-STEP, 0], right: [STEP, 0], up: [0, STEP], down: [0, -STEP]};
    if (way === "spin") return this.spin(!this.spinning);
    if (way === "home") this.reset();
    if (way in turns) this.by(...turns[way]);
    if (way === "in" || way === "out") this.zoomBy(way === "in" ? 1.2 : 1 / 1.2);
    return this.draw();
  }

  by(azimuth, elevation) {
    this.azimuth = (this.azimuth + azimuth) % (2 * Math.PI);
    this.elevation = Math.max(-1.5, Math.min(1.5, this.elevation + elevation));
  }

  zoomBy(factor) {
    this.zoom = Math.max(0.4, Math.min(6, this.zoom * factor));
  }

  // Turns by itself until it is told to stop, or is dragged.
  spin(on) {
    this.spinning = on && Boolean(this.mesh);
    this.onTurn(this.spinning);
    if (!this.spinning) return;
    let before = performance.now();
    const next = (now) => {
      if (!this.spinning) return;
      this.by(SPIN * Math.min(now - before, 100) / 1000, 0);
      before = now;
      this.draw();
      requestAnimationFrame(next);
    };
    requestAnimationFrame(next);
  }

  listen() {
    const arrows = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down"};
    const keys = {...arrows, "+": "in", "=": "in", "-": "out", Home: "home"};
    let last = null;
    this.canvas.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.turn(keys[event.key]);
    });
    this.canvas.addEventListener("pointerdown", (event) => {
      this.spin(false);
      last = [event.clientX, event.clientY];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      this.by((last[0] - event.clientX) * 0.01, (event.clientY - last[1]) * 0.01);
      last = [event.clientX, event.clientY];
      this.draw();
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { last = null; });
    this.canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== this.canvas) return;  // else the page scrolls on past it
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * 0.001));
      this.draw();
    }, {passive: false});
  }
}
