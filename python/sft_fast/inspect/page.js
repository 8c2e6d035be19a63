// The browser of samples and packs, the theme, and the tips of plots. All text of records enters by `textContent`.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en-US");
  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Control characters as pictures, and none that turn the direction of writing: they could hide what is there.
  const visible = (text) => text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g, "\ufffd")
    .replace(/\n/g, "⏎\n");

  // The theme: as the system, light, dark. Kept where the browser allows it.
  const themes = [["", "◐", "as the system"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
  const remember = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("sft-fast-theme", value);
      return localStorage.getItem("sft-fast-theme") || "";
    } catch {
      return "";
    }
  };
  let theme = Math.max(0, themes.findIndex(([name]) => name === remember()));
  const showTheme = () => {
    const [name, sign, words] = themes[theme];
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    byId("theme").textContent = sign;
    byId("theme").setAttribute("aria-label", `Theme: ${words}`);
    byId("theme").title = `Theme: ${words}`;
  };
  byId("theme").addEventListener("click", () => {
    theme = (theme + 1) % themes.length;
    remember(themes[theme][0]);
    showTheme();
  });
  showTheme();

  // Each bar of a plot says in words what it shows.
  const tip = byId("tip");
  document.addEventListener("pointermove", (event) => {
    const target = event.target.closest && event.target.closest(".plot [aria-roledescription=bar]");
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.getAttribute("aria-label");
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${left}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });

  // The lists, and what is in the one that is chosen.
  const names = {
    random: "by chance", longest: "the longest", emptiest: "the least to learn", duplicates: "duplicates",
    spelled: "text like control tokens", packs: "packs",
  };
  const lists = { ...data.lists };
  lists.spelled = Object.keys(data.samples).map(Number).filter((key) => data.samples[key].spelled.length);
  lists.packs = data.packs.map((_, index) => index);
  const list = byId("list"), find = byId("find"), entries = byId("entries"), view = byId("view");
  for (const [key, name] of Object.entries(names)) {
    if (!lists[key] || !lists[key].length) continue;
    const option = element("option", "", `${name} (${lists[key].length})`);
    option.value = key;
    list.append(option);
  }
  const texts = new Map();
  const textOf = (key) => {
    if (!texts.has(key)) texts.set(key, data.samples[key].text.join(""));
    return texts.get(key);
  };
  const matches = (key, text) => data.samples[key].source.includes(text) || textOf(key).includes(text);
  let shownKeys = [], chosen = -1;

  const entry = (key, index) => {
    const item = element("li");
    item.id = `entry-${index}`;
    item.setAttribute("role", "option");
    if (list.value === "packs") {
      const pack = data.packs[key];
      item.append(element("b", "", `pack ${number(pack.number)}`));
      const fill = (100 * pack.tokens / data.sequenceLength).toFixed(1);
      item.append(element("small", "", `${number(pack.size)} samples · ${number(pack.tokens)} tokens · ${fill} %`));
    } else {
      const sample = data.samples[key];
      item.append(element("b", "", `${number(key)} `), element("span", "", sample.source.split("/").pop()));
      item.append(element("small", "", `${number(sample.tokens)} tokens · ${number(sample.trained)} trained`));
    }
    item.addEventListener("click", () => choose(index));
    return item;
  };

  const fill = () => {
    const text = find.value;
    const all = lists[list.value] || [];
    shownKeys = all.filter((key) => {
      if (!text) return true;
      return list.value === "packs" ? data.packs[key].samples.some((one) => matches(one, text)) : matches(key, text);
    });
    entries.replaceChildren(...shownKeys.map(entry));
    byId("entries-note").textContent = text
      ? `${shownKeys.length} of ${all.length} have this text` : `${shownKeys.length} listed`;
    choose(shownKeys.length ? 0 : -1);
  };

  const choose = (index) => {
    for (const item of entries.children) item.setAttribute("aria-selected", "false");
    chosen = index;
    if (index < 0) {
      entries.removeAttribute("aria-activedescendant");
      view.replaceChildren(element("p", "note", "Nothing has this text."));
      return;
    }
    const item = entries.children[index];
    item.setAttribute("aria-selected", "true");
    entries.setAttribute("aria-activedescendant", item.id);
    if (item.offsetTop < entries.scrollTop + entries.offsetTop
      || item.offsetTop + item.offsetHeight > entries.scrollTop + entries.offsetTop + entries.clientHeight) {
      entries.scrollTop = item.offsetTop - entries.offsetTop - entries.clientHeight / 2;
    }
    render();
  };

  const tokens = (sample) => {
    const box = element("div", "tokens");
    const isIn = (positions) => new Set(positions);
    const control = isIn(sample.control), spelled = isIn(sample.spelled), runs = sample.runs;
    const wanted = find.value, whole = wanted ? sample.text.join("") : "";
    const hits = [];
    for (let at = wanted ? whole.indexOf(wanted) : -1; at >= 0; at = whole.indexOf(wanted, at + wanted.length)) hits.push(at);
    let run = 0, place = 0, hit = 0;
    sample.text.forEach((text, index) => {
      while (run < runs.length && runs[run] <= index) run += 1;
      const trained = run % 2 === 1;
      let className = "token";
      if (trained) className += " trained";
      if (index % 2) className += " odd";
      if (control.has(index)) className += " control";
      if (spelled.has(index)) className += " spelled";
      const shown = visible(text);
      const token = element("span", className);
      while (hit < hits.length && hits[hit] + wanted.length <= place) hit += 1;
      if (hit < hits.length && hits[hit] < place + text.length && text) {
        token.append(element("mark", "", shown.replace(/\n$/, "")));
      } else {
        token.append(shown.replace(/\n$/, ""));
      }
      place += text.length;
      token.title = `token ${index}, id ${sample.ids[index]}${trained ? ", trained on" : ""}`;
      if (byId("ids").checked) token.append(element("sub", "", sample.ids[index]));
      if (shown.endsWith("\n")) token.append("\n");
      box.append(token);
    });
    if (sample.ids.length < sample.tokens) {
      const left = number(sample.tokens - sample.ids.length);
      box.append(element("p", "cut", `… and ${left} more tokens, which this page does not carry`));
    }
    box.classList.toggle("borders", byId("borders").checked);
    return box;
  };

  const article = (key) => {
    const sample = data.samples[key], made = element("article");
    made.append(element("h3", "", sample.source));
    const part = sample.ids.length < sample.tokens ? ` of the first ${number(sample.ids.length)}` : "";
    made.append(element("p", "meta", `sample ${number(Number(key))} · ${number(sample.tokens)} tokens · ${number(sample.trained)}${part} trained on`));
    made.append(tokens(sample));
    return made;
  };

  const render = () => {
    if (chosen < 0) return;
    const key = shownKeys[chosen];
    if (list.value !== "packs") {
      view.replaceChildren(article(key));
    } else {
      const pack = data.packs[key], head = element("div");
      head.append(element("h3", "", `Pack ${number(pack.number)}`));
      const share = (100 * pack.tokens / data.sequenceLength).toFixed(2);
      head.append(element("p", "meta", `${number(pack.size)} samples · ${number(pack.tokens)} of ${number(data.sequenceLength)} tokens · ${share} % full · attention stays within each sample`));
      const strip = element("div", "strip");
      strip.setAttribute("aria-hidden", "true");
      for (const one of pack.samples) {
        const block = element("span");
        block.style.width = `${100 * data.samples[one].tokens / data.sequenceLength}%`;
        block.title = `${data.samples[one].source}: ${number(data.samples[one].tokens)} tokens`;
        strip.append(block);
      }
      head.append(strip);
      view.replaceChildren(head, ...pack.samples.map(article));
      if (pack.samples.length < pack.size) {
        view.append(element("p", "cut", `… and ${number(pack.size - pack.samples.length)} more samples, which this page does not carry`));
      }
    }
    view.scrollTop = 0;
  };

  list.addEventListener("change", fill);
  find.addEventListener("input", fill);
  for (const id of ["borders", "ids"]) byId(id).addEventListener("change", render);
  entries.addEventListener("keydown", (event) => {
    const page = 10, last = shownKeys.length - 1;
    const moves = { ArrowDown: chosen + 1, ArrowUp: chosen - 1, PageDown: chosen + page, PageUp: chosen - page, Home: 0, End: last };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(last, moves[event.key])));
  });

  // A link to a sample: `#sample-17`.
  const follow = () => {
    const match = /^#sample-(\d+)$/.exec(location.hash);
    const key = match ? Number(match[1]) : -1;
    if (!(key in data.samples)) return;
    const name = Object.keys(names).find((one) => one !== "packs" && (lists[one] || []).includes(key));
    if (!name) return;
    list.value = name;
    find.value = "";
    fill();
    choose(shownKeys.indexOf(key));
    byId("browser").scrollIntoView();
  };
  addEventListener("hashchange", follow);
  document.querySelector(".browser").hidden = false;
  fill();
  follow();
})();
